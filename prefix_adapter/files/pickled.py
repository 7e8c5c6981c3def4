"""Untrusted state dicts that `torch.save` has pickled, checked before torch reads them.

`torch.load(weights_only=True)` runs no code, but it allocates any memory that a file requests: a file of 2 KB can
request 12 GB, with tensors that repeat one number, compressed records, or functions that make a tensor of any size.
This module first reads the pickle without calling the functions that it names, so that each tensor is only described.
torch reads the file after the descriptions have been checked. Weights that PEFT has just pickled are rewritten.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..messages import shorten

# The pickle has names and shapes only; the numbers are in separate records.
_MAX_PICKLE_BYTES = 10_000_000
# The default protocol of `torch.save`.
_PICKLE_PROTOCOL = 2
# The bytes of one number in each type of storage.
_ITEM_BYTES = {
    "FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


@dataclass
class _StorageDescription:
    """The record of a storage in the file, and how many numbers it has."""

    record: str
    numel: int


@dataclass
class _TensorDescription:
    """A dense tensor, as the arguments of `torch._utils._rebuild_tensor_v2` describe it."""

    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _UnsupportedObject:
    """Any other object of torch: a sparse, quantised or meta tensor, an 8-bit dtype."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_: Any) -> _UnsupportedObject:
        return self

    def __setstate__(self, _: Any) -> None:
        pass


class _IgnoredObject:
    """An object that is not used, such as the options of a training run."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Describer(pickle.Unpickler):
    """An unpickler for torch's files that calls nothing that the pickle names.

    Args:
        data: The pickle.
        record_bytes: The bytes of each storage's record, by its name.
        ignored: The names of classes whose objects may be in the file besides tensors.
    """

    def __init__(self, data: bytes, record_bytes: dict[str, int], ignored: frozenset[str]):
        super().__init__(io.BytesIO(data))
        self.record_bytes, self.ignored = record_bytes, ignored

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _TensorDescription(
                storage, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _ITEM_BYTES:
            return name
        if f"{module}.{name}" in self.ignored:
            return _IgnoredObject
        if self.ignored and module.split(".")[0] == "torch":
            raise ValueError(f"it names {shorten(f'{module}.{name}')}, which is no part of a dense tensor")
        if module.split(".")[0] == "torch":
            return _UnsupportedObject(f"{module}.{name}")
        raise ValueError(f"it names {shorten(f'{module}.{name}')}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, record, _, numel = pid
        if kind != "storage" or not isinstance(record, str) or not isinstance(numel, int):
            raise ValueError("a storage is not described as torch describes it")
        if not isinstance(storage, str):
            return storage
        if self.record_bytes.get(record) != numel * _ITEM_BYTES[storage]:
            raise ValueError(f"storage {shorten(record)} does not have the {numel:,} numbers that the pickle claims")
        return _StorageDescription(record, numel)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` has written, in no more memory than the size of the file.

    Args:
        path: A file in the zip format of PyTorch 1.6 or newer.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: If the file is damaged, older than PyTorch 1.6 or no state dict, or a tensor is not a dense tensor
            of a usual dtype; the message names the file and the tensor.
        OSError: If it cannot be read.
    """
    described = _read(path, _describe)
    if not isinstance(described, dict) or not all(isinstance(name, str) for name in described):
        raise ValueError(f"{path} is no state dict: it must be a dictionary of tensors by their names.")
    for name, tensor in described.items():
        _check_description(path, shorten(name), tensor)
    return _read(path, partial(torch.load, map_location="cpu", weights_only=True))


def read_state_dicts(path: Path, ignored: Sequence[Any] = ()) -> dict[str, dict[str, Tensor]]:
    """Read a dictionary of state dicts that `torch.save` has written, as `read_state_dict` reads one of them.

    Args:
        path: A file in the zip format of PyTorch 1.6 or newer.
        ignored: Harmless classes whose objects may stand beside the state dicts.

    Returns:
        The state dicts by name, on the CPU. Other entries are left out.

    Raises:
        ValueError: If the file is damaged, older than PyTorch 1.6, has objects of other classes, or a tensor is not a
            dense tensor of a usual dtype.
        OSError: If it cannot be read.
    """
    # How pickle names bytes, in the protocol of `torch.save`.
    names = {"_codecs.encode", *(f"{each.__module__}.{each.__qualname__}" for each in ignored)}
    described = _read(path, partial(_describe, ignored=frozenset(names)))
    if not isinstance(described, dict):
        raise ValueError(f"{path} is no dictionary of state dicts.")
    parts = {key: part for key, part in described.items() if isinstance(key, str) and isinstance(part, dict)}
    for key, part in parts.items():
        for name, tensor in part.items():
            _check_description(path, shorten(f"{key}.{name}"), tensor)
    with torch.serialization.safe_globals([each for each in ignored if each is not torch.device]):
        found = _read(path, partial(torch.load, map_location="cpu", weights_only=True))
    return {key: dict(found[key]) for key in parts}


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except Exception as error:  # a damaged pickle can make the unpickler fail in any way
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{path} cannot be read: damaged, older than PyTorch 1.6, or with objects other than tensors, which could "
            f"run any code. {shorten(str(error))}"
        ) from error


def replace_pickle(folder: Path) -> None:
    """Rewrite weights that `save_pretrained(safe_serialization=False)` has just pickled as safetensors.

    This package reads no pickled adapters, because a pickle can run code.

    Raises:
        OSError: If the safetensors file cannot be written; the pickle is then still there.
    """
    pickled, safe = folder / WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not pickled.is_file() or (safe.exists() and safe.stat().st_mtime_ns > pickled.stat().st_mtime_ns):
        return
    tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    # Tied embeddings share their memory, which safetensors rejects.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, safe, metadata={"format": "pt"})
    pickled.unlink()
    warnings.warn(
        f"`safe_serialization=False`: the adapter was written to {SAFETENSORS_WEIGHTS_NAME} nevertheless. "
        f"{WEIGHTS_NAME} is a pickle, which can run code when it is read, and this package does not read it.",
        stacklevel=4,
    )


def _describe(path: Path, ignored: frozenset[str] = frozenset()) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
        names = [record.filename for record in records if record.filename.endswith("data.pkl")]
        if len(names) != 1:
            raise ValueError(f"it has {len(names)} records data.pkl")
        root = names[0].removesuffix("data.pkl")
        if archive.getinfo(f"{root}data.pkl").file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has more than {_MAX_PICKLE_BYTES:,} bytes")
        data = archive.read(f"{root}data.pkl")
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        # The unpickler allocates as many entries as the largest argument of a PUT. Later protocols have more opcodes
        # with such arguments.
        if opcode.proto > _PICKLE_PROTOCOL or ("PUT" in opcode.name and not 0 <= int(argument) <= count):
            raise ValueError(f"its pickle has {opcode.name} {shorten(argument)}")
    record_bytes = {record.filename.removeprefix(f"{root}data/"): record.file_size for record in records}
    return _Describer(data, record_bytes, ignored).load()


def _check_description(path: Path, name: str, tensor: Any) -> None:
    storage = tensor.storage if isinstance(tensor, _TensorDescription) else tensor
    if isinstance(storage, _UnsupportedObject):
        raise ValueError(f"{path}: {name} is not a dense tensor of a usual dtype ({shorten(storage.name)}).")
    if not isinstance(tensor, _TensorDescription) or not isinstance(storage, _StorageDescription):
        raise ValueError(f"{path} is no state dict: {name} is no tensor.")
    sizes, strides, offset = tensor.size, tensor.stride, tensor.offset
    lengths_fit = isinstance(sizes, tuple) and isinstance(strides, tuple) and len(sizes) == len(strides)
    if not lengths_fit or not all(type(number) is int and number >= 0 for number in (*sizes, *strides, offset)):
        raise ValueError(f"{path}: {name} has the size {shorten(sizes)} and the strides {shorten(strides)}.")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    if count > storage.numel or (count and last >= storage.numel):
        raise ValueError(f"{path}: {name} would have {count:,} numbers, and the file has {storage.numel:,} for it.")
