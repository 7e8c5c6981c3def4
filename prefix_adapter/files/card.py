"""What is written beside an adapter's weights: the model card, which says how to load the adapter."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

if TYPE_CHECKING:
    from ..config import PrefixTuningV2Config

_START, _END = "<!-- prefix-adapter: loading -->", "<!-- prefix-adapter: end -->"
_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_SECTION = """{start}

## Load this adapter

A P-Tuning v2 prefix ({tokens} virtual tokens) for [PEFT](https://huggingface.co/docs/peft), by the package
`prefix-adapter`. PEFT alone does not know its type, `PREFIX_TUNING_V2`: without the import below, loading ends in
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


def write_model_card(folder: str | os.PathLike[str], config: PrefixTuningV2Config) -> None:
    """Put a section on loading into the `README.md` of an adapter's folder, or renew it; everything else stays."""
    path = Path(folder) / "README.md"
    if path.is_file() and not path.is_symlink():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path)
        card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n")
    base = card.data.get("base_model")
    tags = {*(card.data.tags or ()), "prefix-adapter"}
    if isinstance(base, str) and os.path.isdir(base):
        # The Hub takes names of models there and refuses a card with somebody's path.
        card.data.base_model = None
        tags = {tag for tag in tags if base not in tag}
    card.data.tags = sorted(tags)
    section = _section(config)
    if _START in card.text:
        card.text = re.sub(f"{_START}.*?(?:{_END}|$)", lambda _: section, card.text, count=1, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    # PEFT drops the last line's end whenever it renews a card.
    card.text = f"{card.text.rstrip()}\n"
    _write_whole(path, str(card))


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, in the place of what was there, a link or a pipe too."""
    scratch = path.with_name(f".unfinished-{path.name}")
    try:
        scratch.unlink(missing_ok=True)
        with open(scratch, "x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def replace_pickle(folder: Path) -> None:
    """Turn weights that `save_pretrained(safe_serialization=False)` has just pickled into safetensors.

    Neither this package nor a careful user reads a pickle of somebody else's, so the adapter would be lost.
    """
    pickled, safe = folder / WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not pickled.is_file() or (safe.exists() and safe.stat().st_mtime_ns > pickled.stat().st_mtime_ns):
        return
    tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    # Tied embeddings share their memory, which safetensors does not take.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, safe, metadata={"format": "pt"})
    pickled.unlink()
    warnings.warn(
        f"`safe_serialization=False`: the adapter was written to {SAFETENSORS_WEIGHTS_NAME} all the same. "
        f"{WEIGHTS_NAME} is a pickle, which can run code when it is read, and is not read by this package.",
        stacklevel=4,
    )


def _section(config: PrefixTuningV2Config) -> str:
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    headed = task in ("SEQ_CLS", "TOKEN_CLS")
    return _SECTION.format(
        start=_START,
        end=_END,
        tokens=config.num_virtual_tokens,
        auto_class=_CLASSES.get(task or "", "AutoPeftModel"),
        arguments=", num_labels=num_labels" if headed else "",
        note="\n\n`num_labels` is the number of labels that the head was trained with." if headed else "",
    )
