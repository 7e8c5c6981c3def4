"""The model card of an adapter, which explains how to load it, and the rewriting of pickled weights."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from .whole import new_file

_START, _END = "<!-- prefix-adapter: loading -->", "<!-- prefix-adapter: end -->"
_SECTION = """{start}

## Load this adapter

A P-Tuning v2 prefix ({tokens} virtual tokens) for [PEFT](https://huggingface.co/docs/peft), by the package
`prefix-adapter`. PEFT itself does not have the type `PREFIX_TUNING_V2`: without the import below, loading raises
`KeyError: 'PREFIX_TUNING_V2'`.

```bash
pip install prefix-adapter
```

```python
import prefix_adapter
from peft import {auto_class}

model = {auto_class}.from_pretrained("<this repository or folder>"{arguments})
```{note}

{end}"""


def write_model_card(
    folder: str | os.PathLike[str], num_virtual_tokens: int, task_type: str | None, base_model: str | None
) -> None:
    """Write a section on loading into the `README.md` of an adapter's folder, or replace it; the rest stays.

    Args:
        folder: The adapter's folder.
        num_virtual_tokens: The length of the prefix.
        task_type: PEFT's task type.
        base_model: The base model's name, for a new card.

    Raises:
        OSError: If the card cannot be written; it is then unchanged.
    """
    path = Path(folder) / "README.md"
    if path.is_file() and not path.is_symlink():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData(library_name="peft", base_model=base_model)
        card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n")
    base = card.data.get("base_model")
    tags = {*(card.data.tags or ()), "prefix-adapter"}
    if isinstance(base, str) and os.path.isdir(base):
        # The Hub rejects a card whose base model is a local path.
        card.data.base_model = None
        tags = {tag for tag in tags if base not in tag}
    card.data.tags = sorted(tags)
    section = _section(num_virtual_tokens, task_type)
    if _START in card.text:
        card.text = re.sub(f"{_START}.*?(?:{_END}|$)", lambda _: section, card.text, count=1, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    # PEFT drops the final line break whenever it rewrites a card.
    card.text = f"{card.text.rstrip()}\n"
    with new_file(path) as scratch:
        scratch.write_text(str(card), encoding="utf-8", newline="")


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


def _section(num_virtual_tokens: int, task_type: str | None) -> str:
    task = task_type and str(getattr(task_type, "value", task_type))
    has_head = task in ("SEQ_CLS", "TOKEN_CLS")
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task or "", PeftModel)
    return _SECTION.format(
        start=_START,
        end=_END,
        tokens=num_virtual_tokens,
        auto_class=f"Auto{model_class.__name__}",
        arguments=", num_labels=num_labels" if has_head else "",
        note="\n\n`num_labels` is the number of labels of the trained head." if has_head else "",
    )
