"""Files that somebody else made, looked at before anything is made of them.

PEFT and transformers put an adapter into the model first and read its file afterwards. Here the file is held against
the model before: which tensors it has, of which shapes and dtypes, and whether all of their numbers are finite.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..messages import join_names, shorten
from .source import DTYPES, open_weights, read_safetensors, read_tensor

# What PEFT puts in front of the names of all tensors that it saves.
SAVED = "base_model.model."
# No prefix of a small model has as many parameters as this; one of a large model has fewer than the model.
_PARAMETERS = 100_000_000
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Spec(NamedTuple):
    """What a tensor must be like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """That of a tensor of the model, whole also where DeepSpeed keeps a part of it."""
        return cls(tuple(getattr(tensor, "ds_shape", tensor.shape)), tensor.dtype)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's file.

    Raises:
        ValueError: if the file is damaged, or a tensor has an integer or 8-bit dtype, NaN or Inf.
        OSError: if it cannot be read.
    """
    weights = read_safetensors(path)
    for name, tensor in weights.items():
        _check_dtype(name, tensor.dtype, torch.float32, path)
        _check_finite(name, tensor, tensor.dtype, path)
    return weights


def check_file(
    path: Path,
    needed: Mapping[str, Spec],
    allowed: Mapping[str, Spec],
    model: nn.Module,
    embeddings: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Hold a file of weights against what the config and the base model ask for.

    Args:
        path: a safetensors file.
        needed: the tensors that it must have.
        allowed: those that it may have besides.
        model: the base model; for the messages.
        embeddings: the base model's own embeddings by what PEFT calls them in a file, which it may have too.

    Returns:
        Those of `embeddings` that the file has, and that loading will write to.

    Raises:
        ValueError: if it is damaged, lacks a tensor, has one that belongs to nothing, or one of another shape or
            dtype, or with NaN or Inf; the message names the file and the tensor.
        OSError: if it cannot be read.
    """
    embeddings = embeddings or {}
    with open_weights(path) as file:
        found: dict[str, tuple[Any, Any]] = {}
        for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
            part = file.get_slice(name)
            found[name] = tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())
        _check_vocabulary(found, embeddings, path)
        specs = _check_specs(found, needed, {**allowed, **_specs(embeddings)}, path, type(model).__name__)
        for name in found:
            _check_finite(name, read_tensor(file, name, path), specs[name].dtype, path)
    return {name: tensor for name, tensor in embeddings.items() if name in found}


def check_embeddings(path: Path, model: nn.Module, heads: Iterable[str], users: str) -> None:
    """Refuse a file with embeddings that are not the base model's own, which loading it would change.

    Args:
        path: a safetensors file.
        model: the base model.
        heads: the config's `modules_to_save`.
        users: who else uses the base model's embeddings; for the message.

    Raises:
        ValueError: if it has such.
    """
    endings = tuple(heads)
    trained = [name for name, _ in model.named_modules() if endings and name.endswith(endings)]
    embeddings, _ = find_embeddings(model, SAVED, trained)
    with open_weights(path) as file:
        found = {name: file.get_slice(name).get_shape() for name in embeddings.keys() & set(file.keys())}
        _check_vocabulary({name: (tuple(shape), None) for name, shape in found.items()}, embeddings, path)
        for name, shape in found.items():
            own = embeddings[name].detach()
            if tuple(shape) == own.shape and not torch.equal(
                read_tensor(file, name, path).to(own.device, own.dtype), own
            ):
                raise ValueError(
                    f"{path} has embeddings of its own, in {name}: loading it would change the embeddings that "
                    f"{users} use. Give the base model these embeddings before it gets any adapter, or save the "
                    "adapter with `save_embedding_layers=False` for a base model that knows its words already."
                )


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec.of(tensor) for name, tensor in tensors.items()}


def _check_vocabulary(found: Mapping[str, tuple[Any, Any]], embeddings: Mapping[str, Tensor], where: Any) -> None:
    """Refuse embeddings for another number of words than the base model has, and say what to do."""
    for name, tensor in embeddings.items():
        shape, own = found.get(name, (None, None))[0], Spec.of(tensor).shape
        if shape and len(shape) == len(own) and shape[0] != own[0] and shape[1:] == own[1:]:
            raise ValueError(
                f"{where} was saved from a base model whose vocabulary had been resized: {name} has {shape[0]} rows, "
                f"and the base model's has {own[0]}. Call `resize_token_embeddings({shape[0]})` on the base model "
                "before loading, with the tokenizer of the adapter."
            )


def check_tensors(
    tensors: Mapping[str, Tensor],
    needed: Mapping[str, Spec],
    allowed: Mapping[str, Spec],
    model: nn.Module,
    embeddings: Mapping[str, Tensor] | None = None,
) -> None:
    """As `check_file`, for tensors that are in memory."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    embeddings = embeddings or {}
    _check_vocabulary(found, embeddings, "What was to be loaded")
    allowed = {**allowed, **_specs(embeddings)}
    specs = _check_specs(found, needed, allowed, "What was to be loaded", type(model).__name__)
    for name, tensor in tensors.items():
        _check_finite(name, tensor, specs[name].dtype, "What was to be loaded")


def _check_specs(
    found: Mapping[str, tuple[Any, Any]],
    needed: Mapping[str, Spec],
    allowed: Mapping[str, Spec],
    where: Any,
    model: str,
) -> dict[str, Spec]:
    specs = {**allowed, **needed}
    problems = []
    if needed.keys() - found.keys():
        problems.append(f"it lacks {join_names(needed.keys() - found.keys())}")
    if found.keys() - specs.keys():
        problems.append(f"it has {join_names(found.keys() - specs.keys())}, which is no part of the adapter")
    if problems:
        raise ValueError(
            f"{where} does not fit its config and {model}: {', and '.join(problems)}. Load it as it was saved, onto "
            "the base model that it was trained on. (PEFT's `key_mapping` is not used for this method: rename the "
            "tensors in the file.)"
        )
    for name, (shape, dtype) in found.items():
        if shape != specs[name].shape:
            raise ValueError(
                f"{where} does not fit its config and {model}: {shorten(name)} has the shape {list(shape)} where "
                f"{list(specs[name].shape)} is needed. Load it with its own config, onto the base model that it was "
                "trained on (a task head: with the same `num_labels`). `ignore_mismatched_sizes` has no effect here, "
                "because it would leave random weights in the adapter. To begin a new task with the prefix alone, add "
                "a new adapter and call `prefix_adapter.init_from`."
            )
        _check_dtype(name, dtype, specs[name].dtype, where)
    return specs


def _check_dtype(name: str, found: Any, needed: torch.dtype, where: Any) -> None:
    if found not in _FLOATS if needed.is_floating_point else found != needed:
        wanted = "float32, float16, bfloat16 or float64" if needed.is_floating_point else needed
        raise ValueError(f"{where} does not fit: {shorten(name)} has the dtype {found}, and must have {wanted}.")


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype, where: Any) -> None:
    """Refuse what is not finite in `dtype`, in which it will be used."""
    if tensor.numel() and not tensor.is_meta and tensor.is_floating_point():
        # NaN is the least and the greatest of all, and rounding keeps their order.
        extremes = torch.stack(torch.aminmax(tensor)).to(dtype)
        if not extremes.isfinite().all():
            raise ValueError(
                f"{where} has NaN or Inf in {shorten(name)}, or numbers too large for {dtype}: its training went "
                "wrong, or it is damaged. Ask for another file."
            )


def check_size(model: nn.Module, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse an adapter that would be larger than its base model, before memory is asked for.

    Raises:
        ValueError: if it would have more parameters than the base model, and more than 100 million.
    """
    asked = sum(math.prod(shape) for shape in shapes)
    limit = max(sum(parameter.numel() for parameter in model.parameters()), _PARAMETERS)
    if asked > limit:
        raise ValueError(
            f"The adapter would have {asked:.3g} parameters, more than the {limit:.3g} that it may have with "
            f"{type(model).__name__}. Choose a smaller `num_virtual_tokens` or `encoder_hidden_size` (of a task head: "
            "fewer labels)."
        )


# The names that PEFT itself adds to `modules_to_save` for a task. A model has one of them at most.
_PEFTS_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
# What PEFT calls its tuner and the base model. For some tasks it looks for `modules_to_save` among these too.
_PEFTS_OWN = ("base_model", "base_model.model")


def find_heads(
    model: nn.Module,
    names: Iterable[str],
    attention: Iterable[nn.Module],
    own: Iterable[str],
    task_type: str | None = None,
) -> dict[str, nn.Module]:
    """The modules that PEFT trains and saves besides the adapter, by name: all whose names end with one of `names`.

    Args:
        model: the base model.
        names: the config's `modules_to_save`.
        attention: the modules that get a prefix.
        own: names that the adapter's own modules have in the model.
        task_type: PEFT's, which adds names of heads by itself.

    Raises:
        ValueError: if a name matches no module, or modules that are, contain or lie in modules with a prefix, which
            PEFT would copy, prefix and all.
    """
    endings = tuple(names)
    if any(name.endswith(endings) for name in _PEFTS_OWN if endings):
        raise ValueError(
            f"`modules_to_save` {join_names(endings)} also means the whole model, which PEFT calls {_PEFTS_OWN[1]}. "
            "Name modules of the base model, a task head for instance."
        )
    holders = {name for name in own if name.endswith(endings)} if endings else set()
    if holders:
        raise ValueError(f"`modules_to_save` {join_names(endings)} also means the prefix itself. Use longer names.")
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
    own_heads = _PEFTS_HEADS.get(str(getattr(task_type, "value", task_type)), set())
    if {"classifier", "score"} <= set(endings):
        # PEFT's model for classification adds both to every adapter, whatever its own task type.
        own_heads = own_heads | {"classifier", "score"}
    for ending in endings:
        if ending in own_heads:
            continue
        if not any(name.endswith(ending) for name in heads):
            raise ValueError(_unmatched(model, ending, own))
    return heads


def _unmatched(model: nn.Module, ending: str, own: Iterable[str]) -> str:
    names = [name for name, _ in model.named_modules() if name and not name.startswith(tuple(own))]
    known = dict.fromkeys([*(name.rpartition(".")[2] for name in names), *names])
    near = difflib.get_close_matches(ending, [name for name in known if not name.isdigit()], n=4, cutoff=0.5)
    top = [name for name, _ in model.named_children() if name in names]
    return (
        f"`modules_to_save` names {shorten(repr(ending))}, and no module of {type(model).__name__} has a name that "
        f"ends so. {'Similar names are' if near else 'Its parts are'} {', '.join(near or top)}."
    )


def find_embeddings(
    model: nn.Module, prefix: str = "", trained: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """The embeddings of a model, by the names that PEFT gives them in an adapter's file.

    PEFT saves them with an adapter if the vocabulary was resized, or if it is asked to (`save_embedding_layers`).
    Where they are among `modules_to_save`, it also saves both parts of its wrapper: the base model's, and once more
    those of the adapter, which it does not read again.

    Args:
        model: the base model, or a `PeftModel`.
        prefix: what the names in the file begin with.
        trained: names of modules that PEFT will wrap.

    Returns:
        The base model's own tensors that loading such a file writes to, and those in the file that are not read.
    """
    written: dict[str, Tensor] = {}
    unread: dict[str, Spec] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module: Any = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue  # not every model has such
        name = next((name for name, other in model.named_modules() if other is module), None)
        if module is None or name is None:
            continue
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        for key, tensor in (module.original_module if wrapped else module).state_dict(keep_vars=True).items():
            if wrapped or name in trained:
                written[f"{prefix}{name}.original_module.{key}"] = tensor
                unread[f"{prefix}{name}.modules_to_save.{key}"] = Spec.of(tensor)
            else:
                written[f"{prefix}{name}.{key}"] = tensor
    return written, unread


def tensors_of(model: nn.Module, adapter_name: str, layers: Iterable[nn.Module]) -> dict[str, Spec]:
    """What tuner layers hold for an adapter, by name in the model."""
    wanted = {id(layer) for layer in layers}
    specs = {}
    for name, module in model.named_modules():
        if id(module) in wanted:
            for key, tensor in module.state_dict(prefix=f"{name}." if name else "", keep_vars=True).items():
                own = key.removeprefix(f"{name}.")
                if f".{adapter_name}." in own and not own.startswith(("base_layer.", "original_module.")):
                    specs[key] = Spec.of(tensor)
    return specs
