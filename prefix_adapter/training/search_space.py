"""The space of a hyperparameter search: the keys of the recipe that are varied, and their values."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

_PROJECTION = "adapter.prefix_projection"
DEFAULT_SPACE: dict[str, Any] = {
    _PROJECTION: [False, True],
    # The rates published with P-Tuning v2 are 5e-3 to 6e-2 for a table and 1e-4 for an MLP. In short runs a table
    # reached the best score at 1e-1 (docs/learning.md).
    "learning_rate": [
        {"when": {_PROJECTION: False}, "low": 3e-3, "high": 2e-1, "log": True},
        {"when": {_PROJECTION: True}, "low": 1e-4, "high": 3e-3, "log": True},
    ],
    "adapter.num_virtual_tokens": {"low": 4, "high": 128, "log": True},
    # Dropout is left out: its default follows the kind of model, and a decoder learns little with another one.
}
"""The space of a search without `Search.space`, as a user would write it."""
_SHARED_KEYS = ("task", "output_dir", "metric_for_best_model", "mixed_precision", "data")
"""Keys that cannot be varied: the metrics of the trials could not be compared."""

Point = dict[str, Any]
"""A point of the space: the values that Optuna chose, by the name of the parameter."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the search: the values of a key of the recipe, with or without a condition.

    Attributes:
        name: The name of the parameter in Optuna's study.
        key: The key of the recipe.
        distribution: Optuna's distribution of the values.
        choices: The recipe's values by those of Optuna, which has no lists; empty for a range.
        when: The condition: values of other parameters, by name.
    """

    name: str
    key: str
    distribution: BaseDistribution
    choices: dict[Any, Any] = field(default_factory=dict)
    when: Point = field(default_factory=dict)

    def applies(self, point: Point) -> bool:
        """Whether the condition holds in a point with the parameters before this one."""
        return all(point.get(name) == value for name, value in self.when.items())

    def suggest(self, trial: Trial) -> Any:
        """Let Optuna choose a value."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        own: Any = self.distribution
        suggest = trial.suggest_int if isinstance(own.low, int) else trial.suggest_float
        return suggest(self.name, own.low, own.high, step=own.step, log=own.log)

    @property
    def ends(self) -> list[Any]:
        """The choices, or both ends of the range."""
        own: Any = self.distribution
        return list(self.choices) or [own.low, own.high]

    @property
    def grid(self) -> list[Any]:
        """All values, in order.

        Raises:
            RecipeError: If the values are a range without a step.
        """
        own: Any = self.distribution
        if self.choices:
            return list(self.choices)
        if own.step is None:
            raise RecipeError(f"`space.{self.key}`: a grid needs a list of choices, or a `step`.")
        count = round((own.high - own.low) / own.step)
        return [type(own.low)(f"{own.low + i * own.step:.12g}") for i in range(count + 1)]


def default_space(recipe: Recipe, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """The space of a search for which the user sets none.

    Args:
        recipe: The recipe.
        fixed: Keys that keep the recipe's value.

    Raises:
        RecipeError: If the recipe's adapter is not PREFIX_TUNING_V2, or if nothing is left to vary.

    Example:
        >>> default_space(recipe, fixed=["adapter.num_virtual_tokens"])
    """
    kind = recipe.adapter["peft_type"]
    if kind != "PREFIX_TUNING_V2":
        raise RecipeError(
            f"`space`: the default space is for PREFIX_TUNING_V2. Set one for {kind}, for instance "
            '{"learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}}.'
        )
    is_mlp = bool(recipe.adapter.get("prefix_projection"))
    if (
        recipe.init_text or recipe.init_from or recipe.init_rows
    ):  # the initial prefix determines the length, and whether it is a table
        fixed = [*fixed, _PROJECTION, "adapter.num_virtual_tokens"]
    if recipe.adapter.get("num_frozen_tokens"):  # an MLP has none
        fixed = [*fixed, _PROJECTION]
    space = {key: value for key, value in DEFAULT_SPACE.items() if key not in fixed}
    width = recipe.adapter.get("encoder_hidden_size")
    if _PROJECTION in space and width:  # only an MLP has this setting
        space["adapter.encoder_hidden_size"] = {"when": {_PROJECTION: True}, "choices": [width]}
    elif _PROJECTION not in space and "learning_rate" in space:
        rates = DEFAULT_SPACE["learning_rate"][is_mlp]
        space["learning_rate"] = {key: value for key, value in rates.items() if key != "when"}
    if not space:
        raise RecipeError("`space`: you set all keys that the default space varies. Set a space of your own.")
    return space


def parse_space(space: dict[str, Any] | None) -> list[Parameter]:
    """Parse `Search.space`.

    Raises:
        RecipeError: If it is invalid. The message names the key.

    Example:
        >>> parse_space({"batch_size": [8, 16], "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}})
    """
    if not space:
        raise RecipeError("`space` is empty: name at least one key of the recipe to vary.")
    parameters: list[Parameter] = []
    for key, entry in space.items():
        is_conditional = (
            isinstance(entry, list)
            and bool(entry)
            and all(isinstance(each, dict) and "when" in each for each in entry)
        )
        try:
            if key.split(".")[0] in _SHARED_KEYS:
                raise ValueError("it must be the same in all trials.")
            entries = entry if is_conditional else [entry]
            own = [_parse_parameter(key, each, is_conditional, parameters) for each in entries]
            for one, other in itertools.combinations(own, 2):
                if not any(name in other.when and other.when[name] != value for name, value in one.when.items()):
                    raise ValueError(f"{one.when} and {other.when} can both hold at once.")
        except (ValueError, TypeError) as error:
            raise RecipeError(f"`space.{key}`: {error}") from error
        parameters += own
    return parameters


def _parse_parameter(key: str, entry: Any, is_conditional: bool, earlier: list[Parameter]) -> Parameter:
    """Parse one entry of a space.

    Args:
        key: The key of the recipe.
        entry: A list of choices, or a mapping.
        is_conditional: Whether the key has several entries, so that the parameter's name needs the condition.
        earlier: The parameters of the keys before this one.

    Raises:
        ValueError: If the entry is invalid.
        TypeError: If Optuna's distribution has no such argument.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(entry, (list, dict)):
        raise ValueError(f"expected a list of choices or a mapping with `low` and `high`, got {entry!r}.")
    entry = {"choices": entry} if isinstance(entry, list) else dict(entry)
    when = entry.pop("when", {})
    for name, value, kind in (("when", when, dict), ("choices", entry.get("choices", []), list)):
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` must be a {'list' if kind is list else 'mapping'}, got {value!r}.")
    for name, value in when.items():
        condition = next((each for each in earlier if each.name == name and each.choices and not each.when), None)
        if condition is None:
            raise ValueError(f"`when`: {name!r} must be a key with a list of choices, before this key.")
        if value not in condition.choices:
            raise ValueError(f"`when`: {value!r} is none of the choices of {name!r}, {list(condition.choices)}.")
    known = {"choices"} if "choices" in entry else {"low", "high", "log", "step", "type"}
    for name in entry:
        if name not in known:
            raise ValueError(f"{name!r} is unknown here; the known names are {sorted({*known, 'when'})}.")
    condition_text = ", ".join(f"{name.rpartition('.')[2]}={json.dumps(value)}" for name, value in when.items())
    full_name = f"{key} ({condition_text})" if is_conditional else key
    if "choices" in entry:
        choices = {
            each if isinstance(each, (str, int, float, type(None))) else json.dumps(each): each
            for each in entry["choices"]
        }
        if not choices or len(choices) < len(entry["choices"]):
            raise ValueError(f"there must be one or more choices that differ, got {entry['choices']}.")
        return Parameter(full_name, key, CategoricalDistribution(list(choices)), choices, when)
    for end in ("low", "high"):
        if type(entry.get(end)) not in (int, float):
            raise ValueError(f"`{end}` must be a number, got {entry.get(end)!r}.")
    is_whole = all(type(entry[end]) is int for end in ("low", "high"))
    kind = entry.pop("type", "int" if is_whole else "float")
    if kind not in ("int", "float") or (kind == "int" and not is_whole):
        raise ValueError(f"`type` must be float, or int with whole `low` and `high`; got {kind!r}.")
    distribution = (IntDistribution if kind == "int" else FloatDistribution)(**entry)
    return Parameter(full_name, key, distribution, when=when)


def choose_point(space: list[Parameter], choose: Callable[[Parameter], Any]) -> Point:
    """Choose a value of each parameter whose condition holds."""
    point: Point = {}
    for parameter in space:
        if parameter.applies(point):
            point[parameter.name] = choose(parameter)
    return point


def all_points(space: list[Parameter]) -> list[Point]:
    """All points of a space, for a grid search.

    Raises:
        RecipeError: If a parameter is a range without a step.
    """
    points: list[Point] = [{}]
    for parameter in space:
        points = [
            extended
            for point in points
            for extended in (
                [{**point, parameter.name: value} for value in parameter.grid] if parameter.applies(point) else [point]
            )
        ]
    return points


def recipe_values(space: list[Parameter], point: Point) -> dict[str, Any]:
    """The values of a point by the recipe's keys, without keys for which no condition holds."""
    found = ((parameter, point[parameter.name]) for parameter in space if parameter.name in point)
    return {parameter.key: parameter.choices.get(value, value) for parameter, value in found}
