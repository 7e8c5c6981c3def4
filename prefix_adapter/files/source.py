"""Where an adapter's files are, and how they are read without trusting them."""

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

# A safetensors header is JSON, and parsed as a whole: this is room for a hundred thousand tensors.
_HEADER = 10_000_000
# A config is JSON too.
_JSON = 1_000_000
# Values that are nested deeper than any config are refused, before anything recursive is done with them.
_DEPTH = 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a config was read, and so where PEFT and transformers will look for the weights.

    Attributes:
        name: a folder, or a name on the Hub.
        subfolder: a folder within it.
        options: arguments of `huggingface_hub.hf_hub_download`.
    """

    name: str
    subfolder: str | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return shorten(os.path.join(self.name, self.subfolder or ""))

    @classmethod
    def of(cls, name: str | os.PathLike[str], subfolder: str | None = None, kwargs: Mapping[str, Any] = {}) -> Source:
        """From the arguments of a `from_pretrained`."""
        options = ("repo_type", "revision", "cache_dir", "token", "local_files_only")
        return cls(str(name), subfolder or None, {key: kwargs[key] for key in options if key in kwargs})

    def config(self) -> Path:
        """The config's file, in the Hub's cache if it comes from there.

        Raises:
            ValueError: if there is none.
        """
        folder = Path(self.name, self.subfolder or "")
        if folder.is_dir():
            if not (folder / CONFIG_NAME).exists():
                raise ValueError(f"{folder} has no {CONFIG_NAME}: it holds no adapter.")
            return folder / CONFIG_NAME
        try:
            return Path(hf_hub_download(self.name, CONFIG_NAME, subfolder=self.subfolder, **self.options))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no folder {shorten(repr(self.name))} with an {CONFIG_NAME}, and on the Hub: "
                f"{shorten(str(error), 500)}"
            ) from error

    def weights(self) -> Path:
        """The file of weights, in the Hub's cache if it comes from there.

        Raises:
            ValueError: if there is none, or it is a pickle.
            OSError: if the Hub cannot be reached, and the file is not in its cache.
        """
        folder = Path(self.name, self.subfolder or "")
        if (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            return folder / SAFETENSORS_WEIGHTS_NAME
        if folder.is_dir():
            raise self._without(pickle=(folder / WEIGHTS_NAME).exists())
        try:
            found = hf_hub_download(self.name, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.options)
        except LocalEntryNotFoundError:
            if self._has_pickle(online=False):
                raise self._without(pickle=True) from None
            raise
        except EntryNotFoundError:
            raise self._without(pickle=self._has_pickle(online=True)) from None
        return Path(found)

    def _has_pickle(self, online: bool) -> bool:
        name = "/".join(part for part in (self.subfolder, WEIGHTS_NAME) if part)
        options = {key: value for key, value in self.options.items() if key in ("repo_type", "revision")}
        if online:
            return file_exists(self.name, name, token=self.options.get("token"), **options)
        return isinstance(
            try_to_load_from_cache(self.name, name, cache_dir=self.options.get("cache_dir"), **options), str
        )

    def _without(self, pickle: bool) -> ValueError:
        if pickle:
            return ValueError(
                f"{self.name} has its weights in {WEIGHTS_NAME}, a pickle, which can run code when it is read, and is "
                f"not read here. Ask for {SAFETENSORS_WEIGHTS_NAME}, which `save_pretrained` writes."
            )
        return ValueError(
            f"{self.name} has a config, but no {SAFETENSORS_WEIGHTS_NAME}. Copy or download the adapter as a whole; "
            "to add a new one with the same settings, make the config with `dataclasses.replace(config)`."
        )


def _damaged(path: Path, why: Any) -> ValueError:
    return ValueError(
        f"{path} is damaged: {shorten(str(why), 500)}. Download or copy it again, or ask for another file."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object: an adapter's or a model's configuration.

    Raises:
        ValueError: if it is anything else, not text in UTF-8 or absurdly large or deep; the message names the file.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. It should be a configuration, as JSON.")
    if path.stat().st_size > _JSON:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, too many for a configuration")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({shorten(str(error))})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    level: list[Any] = [content]
    for _ in range(_DEPTH):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return content
    raise _damaged(path, f"its values are nested more than {_DEPTH} levels deep")


def open_weights(path: Path) -> Any:
    """Open a safetensors file: a context manager, as `safetensors.safe_open` returns it.

    Raises:
        ValueError: if it is no whole safetensors file; safetensors itself compares the header with the file's size.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. It should be the adapter's weights, as safetensors.")
    with open(path, "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > _HEADER:
        raise _damaged(path, f"its header would have {header:,} bytes")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: if the file is damaged, or a tensor has a dtype of 8 bits or of another unusual kind.
        OSError: if it cannot be read.
    """
    weights = {}
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"{path}: {shorten(name)} has the dtype {shorten(dtype)}, which is not read here.")
            weights[name] = read_tensor(file, name, path)
    return weights


def read_tensor(file: Any, name: str, path: Path) -> Tensor:
    """Read one tensor of an open safetensors file.

    Raises:
        ValueError: if the file is damaged there; the message names the file and the tensor.
    """
    try:
        return file.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError, AttributeError) as error:
        raise _damaged(path, f"{shorten(name)} cannot be read ({error})") from error
