"""From a data set to a published adapter, with Accelerate. Needs the extra `train`; the core never imports this."""

from .data import DataError
from .evaluation import answer_rows
from .inference import evaluate_adapter, load_trained, predict
from .loop import TrainingDiverged, TrainingInterrupted
from .multitask import JointRecipe, load_joint_recipe, train_together
from .recipe import Data, Recipe, RecipeError, load_recipe, recipe_names
from .run import train

__all__ = [
    "Data",
    "DataError",
    "JointRecipe",
    "Recipe",
    "RecipeError",
    "TrainingDiverged",
    "TrainingInterrupted",
    "answer_rows",
    "evaluate_adapter",
    "load_joint_recipe",
    "load_recipe",
    "load_trained",
    "predict",
    "recipe_names",
    "train",
    "train_together",
]
