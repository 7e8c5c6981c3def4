"""All or nothing: what fails in the middle of adding or loading an adapter leaves the model as it was."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from .config import PrefixTuningV2Type


class _Snapshot:
    """The modules of a model, with their attributes, hooks and children, and which parameters are trained.

    Containers are emptied and filled again, not replaced: the handles of hooks refer to them.

    Args:
        model: the model.
        adapter_name: of an adapter that is loaded once more, whose values are kept too.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None):
        self._modules = [(module, type(module), self._attributes(module)) for module in model.modules()]
        parameters = list(model.named_parameters())
        self._trained = [(parameter, parameter.requires_grad) for _, parameter in parameters]
        self._values: list[tuple[Tensor, Tensor]] = [
            (parameter, parameter.detach().clone())
            for name, parameter in parameters
            if adapter_name is not None and f".{adapter_name}." in name
        ]

    @staticmethod
    def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {
            name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
            for name, value in vars(module).items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
                vars(module)[name] = value
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        for value, kept in self._values:
            value.copy_(kept)


class _Thread(threading.local):
    """What this thread is adding.

    Attributes:
        models: the models that are changed, from the outside in.
        ours: whether the adapter is one of this package.
        options: what the caller asked for that an adapter of this package does not have.
    """

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self.ours = False
        self.options: list[str] = []


_thread = _Thread()


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """If what is done to `model` in here fails, undo it: on any error, KeyboardInterrupt among them.

    Only if it has to do with an adapter of this package, which `of_this_package` says.

    Args:
        model: the model that is changed.
        adapter_name: the name of an adapter that it has already and that is loaded once more.
    """
    if any(model is part for one in _thread.models for part in one.modules()):
        # What is around this undoes it.
        yield
        return
    snapshot = _Snapshot(model, adapter_name)
    try:
        _thread.models.append(model)
        yield
    except BaseException:
        if _thread.ours:
            snapshot.restore()
        raise
    finally:
        _thread.models.remove(model)
        if not _thread.models:
            _thread.ours, _thread.options = False, []


def of_this_package() -> None:
    """What this thread is adding or loading is an adapter of this package.

    Raises:
        ValueError: if the caller asked for something that there is not for such an adapter.
    """
    _thread.ours = bool(_thread.models)
    if _thread.options:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in _thread.options)} cannot be used for a prefix adapter: all of its "
            "tensors must have the names and sizes that the model gives them. Load it without."
        )


def _unsupported(given: dict[str, Any]) -> list[str]:
    """The options of loading, by the arguments of a call, that an adapter of this package does not have."""
    config = given.get("load_config")
    everything = {**(vars(config) if config is not None else {}), **given, **given.get("kwargs", {})}
    return [name for name in ("ignore_mismatched_sizes", "key_mapping") if everything.get(name)]


def _guard(owner: Any, name: str, argument: str, done: Callable[[nn.Module], None]) -> None:
    """Have a method of PEFT or transformers undo what it did to the model in `argument` if it fails.

    They change the model step by step, and roll back little of that, and nothing after a KeyboardInterrupt.
    """
    method = vars(owner)[name]
    function = method.__func__ if isinstance(method, classmethod) else method
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        model, adapter_name = given.get(argument), given.get("adapter_name")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        known = adapter_name in (getattr(model, "peft_config", None) or {}) if argument == "self" else False
        outermost = not _thread.models
        with all_or_nothing(model, adapter_name if known else None):
            if outermost:
                _thread.options = _unsupported(given)
            if getattr(model, "peft_type", None) == PrefixTuningV2Type.PREFIX_TUNING_V2:
                of_this_package()
            result = function(*args, **kwargs)
            done(result if isinstance(result, nn.Module) else args[0])
            return result

    setattr(owner, name, classmethod(guarded) if isinstance(method, classmethod) else guarded)


def guard_all(done: Callable[[nn.Module], None]) -> None:
    """Guard every way in which PEFT and transformers add or load an adapter, and then call `done` with the result."""
    for owner in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        if "__init__" in vars(owner):
            _guard(owner, "__init__", "model", done)
    _guard(PeftModel, "from_pretrained", "model", done)
    for owner in (PeftModel, PeftAdapterMixin):
        _guard(owner, "add_adapter", "self", done)
        _guard(owner, "load_adapter", "self", done)
