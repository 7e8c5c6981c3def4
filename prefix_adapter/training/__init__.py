"""Training with Accelerate, from a data set to a published adapter. Needs the extra `train`.

Only the command line imports this package. Names are imported when they are used, so that a recipe can be read without
importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import DataError
    from .evaluation import answer_rows
    from .inference import evaluate_adapter, load_trained, predict
    from .loop import TrainingDiverged, TrainingInterrupted
    from .multitask import JointRecipe, load_joint_recipe, train_together
    from .recipe import Data, Recipe, RecipeError, load_recipe, recipe_names
    from .run import train
    from .settings import SelfStudy
    from .study import distil, self_study

__all__ = [
    "Data",
    "DataError",
    "JointRecipe",
    "Recipe",
    "RecipeError",
    "SelfStudy",
    "TrainingDiverged",
    "TrainingInterrupted",
    "answer_rows",
    "distil",
    "evaluate_adapter",
    "load_joint_recipe",
    "load_recipe",
    "load_trained",
    "predict",
    "recipe_names",
    "self_study",
    "train",
    "train_together",
]
_NAMES = {
    "data": ("DataError",),
    "evaluation": ("answer_rows",),
    "inference": ("evaluate_adapter", "load_trained", "predict"),
    "loop": ("TrainingDiverged", "TrainingInterrupted"),
    "multitask": ("JointRecipe", "load_joint_recipe", "train_together"),
    "recipe": ("Data", "Recipe", "RecipeError", "load_recipe", "recipe_names"),
    "run": ("train",),
    "study": ("distil", "self_study"),
    "settings": ("SelfStudy",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
