"""State dicts that `torch.save` has pickled, of somebody else's: looked at before torch reads them.

`torch.load(weights_only=True)` runs no code, but it makes what a file asks for: a file of 2 KB can ask for 12 GB, in
tensors that repeat one number, in compressed records, or by functions that make a tensor of any size. Here the pickle
is read with nothing behind its names, so that its tensors are descriptions; torch reads the file when they hold.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages import shorten

# Names and shapes; the numbers are in records of their own.
_PICKLE = 10_000_000
# The protocol that `torch.save` uses, unless it is told to use another one.
_PROTOCOL = 2
_STORAGES = {
    "FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


@dataclass
class _Storage:
    record: str
    numel: int


@dataclass
class _Tensor:
    storage: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Other:
    """Whatever else torch would make: a sparse, quantised or meta tensor, a dtype of 8 bits."""

    def __init__(self, what: str):
        self.what = what

    def __call__(self, *_: Any) -> _Other:
        return self

    def __setstate__(self, _: Any) -> None:
        pass


class _Describer(pickle.Unpickler):
    """Reads a pickle of torch's without calling anything that it names."""

    def __init__(self, data: bytes, sizes: dict[str, int]):
        super().__init__(io.BytesIO(data))
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _Tensor(
                storage, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        if module.split(".")[0] == "torch":
            return _Other(f"{module}.{name}")
        raise ValueError(f"it names {shorten(f'{module}.{name}')}, which makes no tensor")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, record, _, numel = pid
        if kind != "storage" or not isinstance(record, str) or not isinstance(numel, int):
            raise ValueError("a storage has another form than torch's")
        if not isinstance(storage, str):
            return storage
        if self.sizes.get(record) != numel * _STORAGES[storage]:
            raise ValueError(f"storage {shorten(record)} has not the {numel:,} numbers that it says")
        return _Storage(record, numel)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict that was written by `torch.save`, in no more memory than the file has bytes.

    Raises:
        ValueError: if the file is damaged, older than PyTorch 1.6 or no state dict, or a tensor is of another kind
            than dense numbers of the usual types; the message names the file and the tensor.
        OSError: if it cannot be read.
    """
    described = _read(path, _describe)
    if not isinstance(described, dict) or not all(isinstance(name, str) for name in described):
        raise ValueError(f"{path} is no state dict: a dictionary of tensors by their names.")
    for name, tensor in described.items():
        _check(path, shorten(name), tensor)
    return _read(path, partial(torch.load, map_location="cpu", weights_only=True))


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except Exception as error:  # a damaged pickle can make the unpickler fail in any way
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"{path} cannot be read: damaged, a pickle of more than tensors, which could run any code, or not of "
            f"PyTorch 1.6 or newer. {shorten(str(error))}"
        ) from error


def _describe(path: Path) -> Any:
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
        if archive.getinfo(f"{root}data.pkl").file_size > _PICKLE:
            raise ValueError(f"its pickle has more than {_PICKLE:,} bytes")
        data = archive.read(f"{root}data.pkl")
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        # The unpickler makes room for as many entries as the largest argument of a PUT says. Later protocols have more
        # opcodes whose arguments it believes.
        if opcode.proto > _PROTOCOL or ("PUT" in opcode.name and not 0 <= int(argument) <= count):
            raise ValueError(f"its pickle has {opcode.name} {shorten(argument)}")
    sizes = {record.filename.removeprefix(f"{root}data/"): record.file_size for record in records}
    return _Describer(data, sizes).load()


def _check(path: Path, name: str, tensor: Any) -> None:
    kind = tensor.storage if isinstance(tensor, _Tensor) else tensor
    if isinstance(kind, _Other):
        raise ValueError(f"{path}: {name} is not a dense tensor of numbers of a usual type ({shorten(kind.what)}).")
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{path} is no state dict: {name} is no tensor.")
    sizes, strides, offset = tensor.size, tensor.stride, tensor.offset
    numbers = (*sizes, *strides, offset) if isinstance(sizes, tuple) and isinstance(strides, tuple) else ("",)
    if len(sizes) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{path}: {name} has the size {shorten(sizes)} and the strides {shorten(strides)}.")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) > kind.numel or (math.prod(sizes) and last >= kind.numel):
        raise ValueError(
            f"{path}: {name} would have {math.prod(sizes):,} numbers, and there are {kind.numel:,} in the file."
        )
