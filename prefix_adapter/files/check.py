"""Checks of untrusted weights, made before anything changes in the model.

PEFT and transformers put an adapter into the model first and read its file afterwards. This module compares the file
with the model before: which tensors it has, their shapes and dtypes, and whether all of their numbers are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..messages import join_names, shorten
from .contents import SAVED_ROOT, TensorSpec, find_embeddings, names_ending_with
from .source import DTYPES, open_weights, read_header, read_safetensors, read_tensor

# An adapter may be larger than a small base model, up to this number of parameters.
_FREE_PARAMETERS = 100_000_000
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Shapes = Mapping[str, tuple[int, ...]]
# The shape and the dtype of a tensor in a file. A dtype that torch does not have is the text of the file.
_Found = tuple[tuple[int, ...], torch.dtype | str]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter's file.

    Raises:
        ValueError: If the file is damaged, or a tensor has an integer or 8-bit dtype, NaN or Inf.
        OSError: If it cannot be read.
    """
    weights = read_safetensors(path)
    for name, tensor in weights.items():
        _check_dtype(name, tensor.dtype, torch.float32, path)
        _check_finite(name, tensor, tensor.dtype, path)
    return weights


def check_file(
    path: Path,
    needed: Mapping[str, TensorSpec],
    allowed: Mapping[str, TensorSpec],
    model: nn.Module,
    embeddings: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compare a file of weights with the tensors that the config and the base model require.

    Args:
        path: A safetensors file.
        needed: The tensors that the file must have.
        allowed: The tensors that it may have besides.
        model: The base model, for the messages.
        embeddings: The base model's own embeddings by PEFT's names for them in a file. The file may have them too.

    Returns:
        The items of `embeddings` that the file has, and that loading it overwrites.

    Raises:
        ValueError: If the file is damaged, a tensor is missing, belongs to nothing or has another shape or dtype, or
            has NaN or Inf; the message names the file and the tensor.
        OSError: If it cannot be read.
    """
    embeddings = embeddings or {}
    with open_weights(path) as file:
        found: dict[str, _Found] = {
            name: (shape, DTYPES.get(dtype, dtype)) for name, (shape, dtype) in read_header(file).items()
        }
        _check_all(found, partial(read_tensor, file, path), needed, allowed, embeddings, str(path), model)
    return {name: tensor for name, tensor in embeddings.items() if name in found}


def check_tensors(
    tensors: Mapping[str, Tensor],
    needed: Mapping[str, TensorSpec],
    allowed: Mapping[str, TensorSpec],
    model: nn.Module,
    embeddings: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare tensors in memory with the required ones, as `check_file` does for a file."""
    found: dict[str, _Found] = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    _check_all(found, tensors.__getitem__, needed, allowed, embeddings or {}, "The state dict", model)


def check_embeddings(path: Path, model: nn.Module, heads: Iterable[str], users: str) -> None:
    """Reject a file with embeddings that differ from the base model's, which loading the file would change.

    Args:
        path: A safetensors file.
        model: The base model.
        heads: The config's `modules_to_save`.
        users: The other users of the base model's embeddings, for the message.

    Raises:
        ValueError: If the file has such embeddings.
    """
    embeddings, _ = find_embeddings(model, SAVED_ROOT, names_ending_with(model, heads))
    with open_weights(path) as file:
        found = {name: shape for name, (shape, _) in read_header(file).items() if name in embeddings}
        _check_vocabulary(found, embeddings, str(path))
        for name, shape in found.items():
            own = embeddings[name].detach()
            if shape == own.shape and not torch.equal(read_tensor(file, path, name).to(own.device, own.dtype), own):
                raise ValueError(
                    f"{path} has embeddings of its own, in {name}: loading it would change the embeddings that "
                    f"{users} use. Give the base model these embeddings before it gets any adapter, or save the "
                    "adapter with `save_embedding_layers=False` for a base model that has its vocabulary already."
                )


def _check_vocabulary(shapes: Shapes, embeddings: Mapping[str, Tensor], where: str) -> None:
    """Reject embeddings for another vocabulary size than the base model's."""
    for name, tensor in embeddings.items():
        shape, own = shapes.get(name), TensorSpec.of(tensor).shape
        if shape and len(shape) == len(own) and shape[0] != own[0] and shape[1:] == own[1:]:
            raise ValueError(
                f"{where} was saved from a base model whose vocabulary had been resized: {name} has {shape[0]} rows, "
                f"and the base model's has {own[0]}. Call `resize_token_embeddings({shape[0]})` on the base model "
                "before loading, with the tokenizer of the adapter."
            )


def _check_all(
    found: Mapping[str, _Found],
    read: Callable[[str], Tensor],
    needed: Mapping[str, TensorSpec],
    allowed: Mapping[str, TensorSpec],
    embeddings: Mapping[str, Tensor],
    where: str,
    model: nn.Module,
) -> None:
    """Compare names, shapes and dtypes, and then read each tensor by its name and check its numbers."""
    shapes = {name: shape for name, (shape, _) in found.items()}
    _check_vocabulary(shapes, embeddings, where)
    specs = {**allowed, **{name: TensorSpec.of(tensor) for name, tensor in embeddings.items()}, **needed}
    needed_shapes, allowed_shapes = ({name: spec.shape for name, spec in each.items()} for each in (needed, specs))
    misfits = find_misfits(shapes, needed_shapes, allowed_shapes)
    if misfits:
        raise ValueError(
            f"{where} does not fit its config and {type(model).__name__}: {'; '.join(misfits)}. Load it as it was "
            "saved, onto the base model that it was trained on (a task head: with the same `num_labels`). PEFT's "
            "`key_mapping` is not used for this method: rename the tensors in the file. `ignore_mismatched_sizes` has "
            "no effect here, because it would leave random weights in the adapter. To begin a new task with the "
            "prefix alone, add a new adapter and call `prefix_adapter.init_from`."
        )
    for name, (_, dtype) in found.items():
        _check_dtype(name, dtype, specs[name].dtype, where)
    for name in found:
        _check_finite(name, read(name), specs[name].dtype, where)


def _check_dtype(name: str, found: torch.dtype | str, needed: torch.dtype, where: str | Path) -> None:
    if found not in _FLOATS if needed.is_floating_point else found != needed:
        wanted = "float32, float16, bfloat16 or float64" if needed.is_floating_point else needed
        raise ValueError(f"{where} does not fit: {shorten(name)} has the dtype {found}, and must have {wanted}.")


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype, where: str | Path) -> None:
    """Reject numbers that are not finite in `dtype`, in which the model uses them."""
    if tensor.numel() and not tensor.is_meta and tensor.is_floating_point():
        # NaN is both the minimum and the maximum, and rounding keeps the order of numbers.
        extremes = torch.stack(torch.aminmax(tensor)).to(dtype)
        if not extremes.isfinite().all():
            raise ValueError(
                f"{where} has NaN or Inf in {shorten(name)}, or numbers too large for {dtype}: its training failed, "
                "or it is damaged. Ask for another file."
            )


def find_misfits(found: Shapes, needed: Shapes, allowed: Shapes) -> list[str]:
    """Compare names and shapes of tensors, and describe the differences.

    Args:
        found: The shapes of the tensors that there are.
        needed: The shapes of the tensors that must be there.
        allowed: The shapes of other tensors that may be there.

    Returns:
        A description for each kind of difference; none if the tensors fit.
    """
    shapes = {**allowed, **needed}
    missing, unknown = needed.keys() - found.keys(), found.keys() - shapes.keys()
    misfits = [f"it lacks {join_names(missing)}"] if missing else []
    if unknown:
        misfits.append(f"it has {join_names(unknown)}, which is no part of the adapter")
    resized = [name for name, shape in found.items() if shapes.get(name, shape) != shape]
    for name in resized[:2]:
        misfits.append(f"{shorten(name)} has the shape {list(found[name])} where {list(shapes[name])} is needed")
    if len(resized) > 2:
        misfits.append(f"{len(resized) - 2} more tensors have other shapes")
    return misfits


def check_size(model: nn.Module, shapes: Iterable[tuple[int, ...]]) -> None:
    """Reject an adapter that would be larger than its base model, before memory is allocated.

    Args:
        model: The base model.
        shapes: The shapes of the adapter's tensors.

    Raises:
        ValueError: If it would have more parameters than the base model, and more than 100 million.
    """
    size = sum(math.prod(shape) for shape in shapes)
    limit = max(sum(parameter.numel() for parameter in model.parameters()), _FREE_PARAMETERS)
    if size > limit:
        raise ValueError(
            f"The adapter would have {size:.3g} parameters, more than the {limit:.3g} that it may have with "
            f"{type(model).__name__}. Choose a smaller `num_virtual_tokens` or `encoder_hidden_size` (for a task "
            "head: fewer labels)."
        )
