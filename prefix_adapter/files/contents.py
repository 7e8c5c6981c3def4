"""The tensors that PEFT saves with an adapter, and their names in its file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..messages import join_names, shorten

# PEFT puts this in front of the name of every tensor that it saves.
SAVED_ROOT = "base_model.model."
# A second adapter has this name, and its files are in a folder of this name beside those of the first one.
SECOND = "second"
# The names that PEFT itself adds to `modules_to_save`, by task type. A model has at most one of them.
PEFT_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
# PEFT's names for its tuner and the base model. For some tasks PEFT compares `modules_to_save` with these too.
_PEFT_MODULES = ("base_model", "base_model.model")


class TensorSpec(NamedTuple):
    """The shape and the dtype that a tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor of the model. For a tensor that DeepSpeed has divided, it has the whole shape."""
        return cls(tuple(getattr(tensor, "ds_shape", tensor.shape)), tensor.dtype)


def find_heads(
    model: nn.Module,
    names: Iterable[str],
    attention: Iterable[nn.Module],
    own: Iterable[str],
    task_type: str | None = None,
) -> dict[str, nn.Module]:
    """Find the modules that PEFT trains and saves besides the adapter: all whose names end with one of `names`.

    Args:
        model: The base model.
        names: The config's `modules_to_save`.
        attention: The modules that get a prefix.
        own: The names of the adapter's own modules in the model.
        task_type: PEFT's task type, for which PEFT itself adds names of heads.

    Returns:
        The modules by their names in the model.

    Raises:
        ValueError: If a name matches no module, or a module that has a prefix, contains one or is inside of one. PEFT
            would copy such a module with its prefix.
    """
    endings = tuple(names)
    if any(name.endswith(endings) for name in _PEFT_MODULES if endings):
        raise ValueError(
            f"`modules_to_save` {join_names(endings)} also means the whole model, which PEFT calls "
            f"{_PEFT_MODULES[1]}. Name modules of the base model, a task head for instance."
        )
    if endings and any(name.endswith(endings) for name in own):
        raise ValueError(f"`modules_to_save` {join_names(endings)} also means the adapter itself. Use longer names.")
    heads: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    with_prefix = {id(module) for module in attention}
    for name, module in model.named_modules(remove_duplicate=False):
        if not endings or name.startswith(tuple(wrappers)):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{name}.")
            module = module.original_module
        if not name.endswith(endings):
            continue
        if any(id(part) in with_prefix for part in module.modules()):
            raise ValueError(
                f"`modules_to_save` {join_names(endings)} also means {name or 'the whole model'}, whose attention "
                "gets a prefix. Name modules without such attention, a task head for instance."
            )
        if not name or name.startswith(tuple(f"{head}." for head in heads)):
            raise ValueError(
                f"`modules_to_save` {join_names(endings)} means {name} and a module around it. Use longer names."
            )
        heads[name] = module
    optional = PEFT_HEADS.get(str(getattr(task_type, "value", task_type)), set())
    if {"classifier", "score"} <= set(endings):
        # PEFT's model for classification adds both names to every adapter, whatever the adapter's task type is.
        optional = optional | {"classifier", "score"}
    for ending in endings:
        if ending not in optional and not any(name.endswith(ending) for name in heads):
            raise ValueError(_no_such_module(model, ending, own))
    return heads


def _no_such_module(model: nn.Module, ending: str, own: Iterable[str]) -> str:
    names = [name for name, _ in model.named_modules() if name and not name.startswith(tuple(own))]
    known = dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names])
    similar = difflib.get_close_matches(ending, [name for name in known if not name.isdigit()], n=4, cutoff=0.5)
    children = [name for name, _ in model.named_children() if name in names]
    return (
        f"`modules_to_save` names {shorten(repr(ending))}, and no module of {type(model).__name__} has a name that "
        f"ends so. {'Similar names are' if similar else 'Its parts are'} {', '.join(similar or children)}."
    )


def find_embeddings(
    model: nn.Module, prefix: str = "", trained: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, TensorSpec]]:
    """Find the input and output embeddings of a model, by the names that PEFT gives them in an adapter's file.

    PEFT saves embeddings with an adapter if the vocabulary was resized, or on request (`save_embedding_layers`). For
    embeddings in `modules_to_save`, PEFT saves both parts of its wrapper: those of the base model, and a second copy
    of those of the adapter. It never reads the second copy.

    Args:
        model: The base model, or a `PeftModel`.
        prefix: The root of the names in the file.
        trained: The names of the modules that PEFT will wrap.

    Returns:
        The base model's tensors that loading such a file overwrites, and the specs of the tensors that PEFT never
        reads.
    """
    written: dict[str, Tensor] = {}
    unread: dict[str, TensorSpec] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module: Any = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue  # not every model has both
        name = next((name for name, other in model.named_modules() if other is module), None)
        if module is None or name is None:
            continue
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        for key, tensor in (module.original_module if wrapped else module).state_dict(keep_vars=True).items():
            if wrapped or name in trained:
                written[f"{prefix}{name}.original_module.{key}"] = tensor
                unread[f"{prefix}{name}.modules_to_save.{key}"] = TensorSpec.of(tensor)
            else:
                written[f"{prefix}{name}.{key}"] = tensor
    return written, unread


def names_ending_with(model: nn.Module, endings: Iterable[str]) -> list[str]:
    """The names of the modules that PEFT wraps for the `modules_to_save` in `endings`."""
    suffixes = tuple(endings)
    return [name for name, _ in model.named_modules() if suffixes and name.endswith(suffixes)]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def tensors_of(model: nn.Module, adapter_name: str, layers: Iterable[nn.Module]) -> dict[str, TensorSpec]:
    """Return the specs of an adapter's tensors in the given tuner layers, by their names in the model."""
    wanted = {id(layer) for layer in layers}
    specs = {}
    for name, module in model.named_modules():
        if id(module) in wanted:
            for key, tensor in module.state_dict(prefix=f"{name}." if name else "", keep_vars=True).items():
                own = key.removeprefix(f"{name}.")
                if f".{adapter_name}." in own and not own.startswith(("base_layer.", "original_module.")):
                    specs[key] = TensorSpec.of(tensor)
    return specs
