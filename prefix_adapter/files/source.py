"""Where the files of an adapter are, and how to read them without trusting them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..messages import shorten

# The header of a safetensors file is JSON that is parsed as a whole. The limit suffices for 100,000 tensors.
_MAX_HEADER_BYTES = 10_000_000
_MAX_JSON_BYTES = 1_000_000
# Deeper nesting is rejected before any recursive code sees the values.
_MAX_JSON_DEPTH = 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class AdapterSource:
    """The place of a saved adapter, from which PEFT and transformers read its config and its weights.

    Attributes:
        name: A folder, or a name on the Hub.
        subfolder: A folder within it.
        options: Arguments of `huggingface_hub.hf_hub_download`.
    """

    name: str
    subfolder: str | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return shorten(os.path.join(self.name, self.subfolder) if self.subfolder else self.name)

    @classmethod
    def of(
        cls, name: str | os.PathLike[str], subfolder: str | None = None, kwargs: Mapping[str, Any] = {}
    ) -> AdapterSource:
        """Make a source from the arguments of a `from_pretrained`; other arguments are ignored."""
        options = ("repo_type", "revision", "cache_dir", "token", "local_files_only")
        given = {key: kwargs[key] for key in options if kwargs.get(key) is not None}
        return cls(str(name), subfolder or None, given)

    @property
    def _folder(self) -> Path:
        return Path(self.name, self.subfolder or "")

    def find(self, name: str, otherwise: str) -> Path:
        """Return the path of a file of the adapter. A file from the Hub is downloaded into its cache.

        Args:
            name: The name of the file.
            otherwise: What a folder without the file is, for the message.

        Raises:
            ValueError: If there is no such file.
        """
        if self._folder.is_dir():
            if not (self._folder / name).exists():
                raise ValueError(f"{self._folder} has no {name}: {otherwise}.")
            return self._folder / name
        try:
            return Path(hf_hub_download(self.name, name, subfolder=self.subfolder, **self.options))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no folder {shorten(repr(self.name))} with the file {name}, and on the Hub: "
                f"{shorten(str(error), 500)}"
            ) from error

    def find_if_there(self, name: str) -> Path | None:
        """Return the path of a file of the adapter; `None` if there is no such file."""
        try:
            found = self.find(name, "it is not needed")
        except ValueError:
            return None
        return found.resolve() if found.is_file() else None

    def find_config(self) -> Path:
        """Return the path of the config file; see `find`."""
        return self.find(CONFIG_NAME, "it holds no adapter")

    def find_weights(self) -> Path:
        """Return the path of the safetensors file. A file from the Hub is downloaded into its cache.

        Raises:
            ValueError: If there is none, or the weights are in a pickle.
            OSError: If the Hub cannot be reached, and the file is not in its cache.
        """
        if (self._folder / SAFETENSORS_WEIGHTS_NAME).exists():
            return self._folder / SAFETENSORS_WEIGHTS_NAME
        if self._folder.is_dir():
            raise self._missing_weights(has_pickle=(self._folder / WEIGHTS_NAME).exists())
        try:
            found = hf_hub_download(self.name, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.options)
        except LocalEntryNotFoundError:
            if self._has_pickle(online=False):
                raise self._missing_weights(has_pickle=True) from None
            raise
        except EntryNotFoundError:
            raise self._missing_weights(has_pickle=self._has_pickle(online=True)) from None
        return Path(found)

    def _has_pickle(self, online: bool) -> bool:
        name = "/".join(part for part in (self.subfolder, WEIGHTS_NAME) if part)
        options = {key: value for key, value in self.options.items() if key in ("repo_type", "revision")}
        if online:
            return file_exists(self.name, name, token=self.options.get("token"), **options)
        return isinstance(
            try_to_load_from_cache(self.name, name, cache_dir=self.options.get("cache_dir"), **options), str
        )

    def _missing_weights(self, has_pickle: bool) -> ValueError:
        if has_pickle:
            return ValueError(
                f"{self.name} has its weights in {WEIGHTS_NAME}. This package reads no pickles, because they can run "
                f"code. Ask for {SAFETENSORS_WEIGHTS_NAME}, which `save_pretrained` writes."
            )
        return ValueError(
            f"{self.name} has a config, but no {SAFETENSORS_WEIGHTS_NAME}. Copy or download the whole adapter. "
            "To add a new adapter with the same settings, make its config with `dataclasses.replace(config)`."
        )

    def damaged_config(self, error: Exception) -> ValueError:
        """The error to raise for a config from here that cannot be used."""
        return ValueError(f"The config of {self} is damaged: {shorten(str(error), 500)}")


def _damaged(path: Path, why: Any) -> ValueError:
    return ValueError(
        f"{path} is damaged: {shorten(str(why), 500)}. Download or copy it again, or ask for another file."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object: the configuration of an adapter or a model.

    Raises:
        ValueError: If the file has any other content, is not UTF-8 text, or is too large or nested too deeply; the
            message names the file.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. It must be a configuration in JSON.")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, too many for a configuration")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({shorten(str(error))})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    level: list[Any] = [content]
    for _ in range(_MAX_JSON_DEPTH):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return content
    raise _damaged(path, f"its values are nested more than {_MAX_JSON_DEPTH} levels deep")


def open_weights(path: Path) -> Any:
    """Open a safetensors file.

    Returns:
        The context manager that `safetensors.safe_open` returns.

    Raises:
        ValueError: If it is not a whole safetensors file; safetensors compares the header with the size of the file.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. It must hold the weights of an adapter in the safetensors format.")
    with open(path, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > _MAX_HEADER_BYTES:
        raise _damaged(path, f"its header would have {header:,} bytes")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def read_header(file: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the safetensors name of the dtype of each tensor in an open safetensors file."""
    header = {}
    for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
        entry = file.get_slice(name)
        header[name] = tuple(entry.get_shape()), entry.get_dtype()
    return header


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ValueError: If the file is damaged, or a tensor has an 8-bit float or another unusual dtype.
        OSError: If it cannot be read.
    """
    weights = {}
    with open_weights(path) as file:
        for name, (_, dtype) in read_header(file).items():
            if dtype not in DTYPES:
                raise ValueError(
                    f"{path}: {shorten(name)} has the dtype {shorten(dtype)}, which this package does not read."
                )
            weights[name] = read_tensor(file, path, name)
    return weights


def read_tensor(file: Any, path: Path, name: str) -> Tensor:
    """Read one tensor of an open safetensors file.

    Raises:
        ValueError: If the tensor is damaged; the message names the file and the tensor.
    """
    try:
        return file.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError, AttributeError) as error:
        raise _damaged(path, f"{shorten(name)} cannot be read ({error})") from error
