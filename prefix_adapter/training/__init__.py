"""From a data set to a published adapter, with Accelerate. Needs the extra `train`; the core never imports this."""

from .data import DataError
from .loop import TrainingDiverged, TrainingInterrupted
from .recipe import Data, Recipe, RecipeError, load_recipe, recipe_names
from .run import train

__all__ = [
    "Data",
    "DataError",
    "Recipe",
    "RecipeError",
    "TrainingDiverged",
    "TrainingInterrupted",
    "load_recipe",
    "recipe_names",
    "train",
]
