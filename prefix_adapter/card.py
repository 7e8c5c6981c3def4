"""What a model card says about loading a prefix adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import PrefixTuningV2Config

_HEADING = "## Load this adapter"
_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_SECTION = """{heading}

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
"""


def write_model_card(folder: str | os.PathLike[str], config: PrefixTuningV2Config) -> None:
    """Put a section on loading into the `README.md` of an adapter's folder; everything else in it stays."""
    path = Path(folder) / "README.md"
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path, tags=["prefix-adapter"])
        card = ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n")
    if _HEADING in card.content:
        return
    card.data.tags = sorted({*(card.data.tags or ()), "prefix-adapter"})
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    auto_class = _CLASSES.get(task or "", "AutoPeftModel")
    headed = task in ("SEQ_CLS", "TOKEN_CLS")
    arguments = ", num_labels=num_labels" if headed else ""
    note = "\n\n`num_labels` is the number of labels that the adapter's head was trained with." if headed else ""
    section = _SECTION.format(
        heading=_HEADING, tokens=config.num_virtual_tokens, auto_class=auto_class, arguments=arguments, note=note
    )
    card.text = f"{card.text.rstrip()}\n\n{section}"
    card.save(path)
