"""The model card of an adapter: what it is, how to load it, its labels and its settings.

A card has parts between comments. A part is generated anew whenever the adapter is saved. All other text, and metadata
that we do not know better, belong to the user and stay. PEFT and transformers write the template of `huggingface_hub`
into a new card; its sections that nobody has filled in are removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

from ..messages import shorten
from ..private import running_push_card
from ..version import __version__
from .contents import SECOND
from .markdown import code, file_name, hub_name, link, table, without_paths
from .whole import new_file

CARD = "README.md"
PLACE = "<this repository or folder>"
"""Stands in the code of a card for the adapter's name on the Hub, or its folder."""

_PLACEHOLDER = "[More Information Needed]"
_TRANSFORMERS = "This model card has been automatically generated."
_VERSIONS = "### Framework versions"
_HEADING = re.compile("(#{1,6}) |<!-- prefix-adapter: ")
_LICENSE = ("license", "license_name", "license_link")
_HIDDEN = ("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "peft_version")
# The longest list of labels in a card, and the largest card of a base model that is read.
_MAX_LABELS, _MAX_BYTES = 100, 2**20


@dataclass(frozen=True)
class OwnCard:
    """What this package writes into a card.

    Attributes:
        title: The title, for a card that has none.
        data: The metadata; entries that are `None` are not written.
        parts: The parts of the text by name.
    """

    title: str
    data: Mapping[str, Any]
    parts: Mapping[str, str]


def adapter_card(
    base_model: str | None,
    method: str,
    load: str,
    *,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    task_type: str | None = None,
    of_peft: bool = True,
) -> OwnCard:
    """The card of an adapter of any method.

    Args:
        base_model: The base model's name or path.
        method: What the adapter is, as a noun phrase: `"A LORA adapter"`.
        load: The Markdown that explains how to load it.
        labels: The names of the head's labels, in their order.
        settings: The settings by name.
        task_type: PEFT's task type.
        of_peft: Whether PEFT can load it.

    Returns:
        The card, with one part.
    """
    known = base_model and hub_name(base_model)
    licence = find_license(base_model) if base_model else {}
    paragraphs = [f"{method}{f' for {link(base_model)}' if base_model else ''}."]
    if licence:
        paragraphs[0] += f" The licence of the base model is {code(licence['license'])}."
    paragraphs += ["## Load this adapter", load]
    if labels:
        shown = ", ".join(code(label, 80) for label in labels[:_MAX_LABELS])
        more = f" and {len(labels) - _MAX_LABELS:,} more" if len(labels) > _MAX_LABELS else ""
        count = "one label" if len(labels) == 1 else f"{len(labels):,} labels, in this order"
        paragraphs += ["## Labels", f"The head has {count}: {shown}{more}."]
    if settings:
        rows = [(code(name), code(without_paths(value))) for name, value in settings.items()]
        paragraphs += ["## Settings", table(["setting", "value"], rows)]
    # PEFT adds its version to cards without this line.
    paragraphs += [_VERSIONS, f"- PEFT {peft.__version__}\n- prefix-adapter {__version__}"]
    data = {
        "library_name": "peft" if of_peft else None,
        "base_model": known,
        "tags": ["prefix-adapter", *([f"base_model:adapter:{known}"] if known and of_peft else ())],
        "pipeline_tag": "text-generation" if task_type == "CAUSAL_LM" else None,
        **licence,
    }
    name = shorten(file_name(known or base_model)) if base_model else ""
    title = re.sub(r"^An? ", "", method).partition(" of ")[0] + (f" for {code(name)}" if name else "")
    return OwnCard(title, data, {"adapter": "\n\n".join(paragraphs)})


def changed_settings(config: PeftConfig) -> dict[str, Any]:
    """The settings of a config that differ from the defaults of its method, by name."""
    defaults = type(config)().to_dict()
    return {
        name: sorted(value, key=str) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in _HIDDEN and value != defaults.get(name)
    }


def task_type_of(config: PeftConfig) -> str | None:
    """PEFT's task type as plain text."""
    task: Any = config.task_type
    return task and str(getattr(task, "value", task))


def peft_code(config: PeftConfig, labels: Sequence[str] | None, *, imports: str = "", mapped: bool = False) -> str:
    """The Markdown with the code that loads a saved adapter through PEFT.

    Args:
        config: The adapter's config.
        labels: The names of the head's labels, if they are known.
        imports: A line in front of the imports.
        mapped: Whether the config file names the class of the base model (`auto_mapping`).
    """
    task = task_type_of(config)
    note, arguments = "", ""
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        arguments = f", num_labels={len(labels) if labels else 'num_labels'}"
        note = "" if labels else "\n\n`num_labels` is the number of labels of the trained head."
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task or "", PeftModel)
    if task or mapped or config.auto_mapping:
        lines = [f"from peft import Auto{model_class.__name__}", ""]
        lines += [f'model = Auto{model_class.__name__}.from_pretrained("{PLACE}"{arguments})']
    else:
        lines = ["from peft import PeftModel", "", f'model = PeftModel.from_pretrained(base_model, "{PLACE}")']
        note = "\n\n`base_model` is the base model, loaded with the class that the adapter was trained with."
    return "```python\n" + "\n".join([*([imports] if imports else ()), *lines]) + f"\n```{note}"


def find_license(base_model: str | os.PathLike[str]) -> dict[str, str]:
    """The licence in the card of a base model: a folder, or a model in the local cache of the Hub.

    Returns:
        `license`, and `license_name` and `license_link` if the card has them; empty if nothing is known.
    """
    name = hub_name(base_model)
    found = try_to_load_from_cache(name, CARD) if name else os.path.join(base_model, CARD)
    try:
        if not isinstance(found, str) or not os.path.isfile(found) or os.path.getsize(found) > _MAX_BYTES:
            return {}
        data = ModelCard.load(found, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):  # another program's card
        return {}
    if not isinstance(data.license, str) or not re.fullmatch(r"[\w.-]{1,50}", data.license):
        return {}
    licence = {"license": data.license}
    if isinstance(data.license_name, str) and re.fullmatch(r"[\w .-]{1,80}", data.license_name):
        licence["license_name"] = data.license_name
    if isinstance(data.license_link, str) and re.fullmatch(r"https://[\w./%-]{1,200}", data.license_link):
        licence["license_link"] = data.license_link
    return licence


def config_card(config: PeftConfig, labels: Sequence[str] | None = None) -> OwnCard:
    """The card of an adapter of another method of PEFT.

    Args:
        config: Its config.
        labels: The names of the head's labels, if they are known.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return adapter_card(
        config.base_model_name_or_path,
        f"{'An' if kind[0] in 'AEIO' else 'A'} {kind} adapter",
        peft_code(config, labels),
        labels=labels,
        settings=changed_settings(config),
        task_type=task_type_of(config),
    )


def own_method_card(
    config: Any, method: str, load: str, settings: Mapping[str, Any], *, mapped: bool = False
) -> OwnCard:
    """The card of an adapter of a method of this package, which PEFT loads once the package is imported.

    Args:
        config: Its config.
        method: What the adapter is, as a noun phrase.
        load: A paragraph of Markdown behind the code that loads it.
        settings: Settings that the card shows even if they are the defaults.
        mapped: Whether the config file names the class of the base model (`auto_mapping`).
    """
    changed, kind = changed_settings(config), config.peft_type.value
    labels = changed.pop("label_names", None)
    note = (
        f"PEFT itself does not have the type `{kind}`: without the import below, loading raises\n"
        f"`KeyError: '{kind}'`.\n\n```bash\npip install prefix-adapter\n```\n\n"
    )
    return adapter_card(
        config.base_model_name_or_path,
        method,
        f"{note}{peft_code(config, labels, imports='import prefix_adapter', mapped=mapped)}\n\n{load}",
        labels=None if labels is None or has_default_names(labels) else labels,
        settings={**settings, **changed},
        task_type=task_type_of(config),
    )


def second_part() -> str:
    """The part of a card on the second adapter of a run, P-Tuning's virtual tokens."""
    return f"""## Load the second adapter

P-Tuning's virtual tokens were trained together with this adapter, and are in the folder `{SECOND}`. The model needs
both. Behind the code above:

```python
import prefix_adapter
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{PLACE}", "{SECOND}", subfolder="{SECOND}")
```

The inputs have the token ids of the setting `placeholder_token_ids` in `{SECOND}/{CONFIG_NAME}` where virtual tokens
stand."""


def fold_note(encoder: str) -> str:
    """The Markdown that explains how to fold the encoder of an adapter, `"An MLP"` for instance."""
    return (
        f"{encoder} computes the adapter's table. To fold it into the table (the outputs stay the same, the file "
        f'becomes smaller):\n\n```bash\nprefix-adapter fold "{PLACE}" folded\n```'
    )


def prefix_card(config: Any, *, mapped: bool = False) -> OwnCard:
    """The card of a prefix adapter.

    Args:
        config: Its `PrefixTuningV2Config`.
        mapped: Whether the config file names the class of the base model (`auto_mapping`).
    """
    count = config.num_virtual_tokens
    rank = f" with low-rank matrices of rank {config.lora_r}" if config.lora_r else ""
    fold = (
        fold_note("An MLP")
        if config.prefix_projection
        else "The prefix is a plain table: there is no MLP to fold, and a prefix cannot be merged into weights."
    )
    method = f"A P-Tuning v2 prefix of {count} virtual token{'' if count == 1 else 's'}{rank}"
    return own_method_card(config, method, fold, {"num_virtual_tokens": count}, mapped=mapped)


def save_own_card(folder: Path, ours: OwnCard, *, by_peft: bool) -> None:
    """Write the card of an adapter of this package that was just saved.

    Args:
        folder: The adapter's folder.
        ours: The card.
        by_peft: Whether `PeftModel.save_pretrained` saved it. PEFT has then written a card into the folder of all
            adapters.

    Raises:
        ValueError: If the card that is there is damaged.
        OSError: If a card cannot be written; it is then unchanged.
    """
    card = write_card(folder / CARD, ours)
    pushed = running_push_card(folder)
    if pushed is not None:
        merge(pushed, OwnCard(ours.title, card.data.to_dict(), ours.parts))
    elif by_peft and not (folder.parent / CONFIG_NAME).exists():
        _save_shared_card(folder.parent, ours)


def _save_shared_card(folder: Path, ours: OwnCard) -> None:
    """Write the card of a folder of adapters with names, where PEFT has just written its template."""
    card = read_card(folder / CARD)
    if card is None or (_PLACEHOLDER not in card.text and _start("adapters") not in card.text):
        return
    names = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    text = f"Each of these folders is an adapter with a card of its own: {', '.join(map(code, names))}."
    shared = OwnCard("Adapters", ours.data, {"adapters": text})
    pushed = running_push_card(folder)
    written = write_card(folder / CARD, shared)
    if pushed is not None:
        merge(pushed, OwnCard(shared.title, written.data.to_dict(), shared.parts))


def has_default_names(labels: Sequence[str]) -> bool:
    """Whether labels have the names that transformers gives to labels without names."""
    return all(label == f"LABEL_{index}" for index, label in enumerate(labels))


# ---- Reading, merging and writing


def read_card(path: Path) -> ModelCard | None:
    """Read a card; `None` if there is no file, or only a link or a pipe.

    Raises:
        ValueError: If it is damaged; the message names it.
    """
    if not path.is_file() or path.is_symlink():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read as a model card ({shorten(str(error))}), and is left as it is. Correct its "
            "metadata, or move it."
        ) from error


def new_card() -> ModelCard:
    """An empty card."""
    return ModelCard.from_template(ModelCardData(), template_str="---\n{{ card_data }}\n---\n")


def write_card(path: Path, ours: OwnCard, into: ModelCard | None = None) -> ModelCard:
    """Write a card into the card at `path`, if there is one.

    Args:
        path: The file.
        ours: What to write.
        into: A card to use in the place of the one at `path`.

    Returns:
        The card.

    Raises:
        ValueError: If the file there is damaged.
        OSError: If the file cannot be written; it is then unchanged.
    """
    card = into or read_card(path) or new_card()
    merge(card, ours)
    with new_file(path) as scratch:
        scratch.write_text(str(card), encoding="utf-8", newline="")
    return card


def merge(card: ModelCard, ours: OwnCard) -> None:
    """Write our parts and metadata into a card. The user's text stays."""
    rest = card.text
    for name in ours.parts:
        start, end = (rf"^{re.escape(mark)}\r?$" for mark in (_start(name), _end(name)))
        # A mark that has lost its end is the user's text, and so is what follows it up to the next one.
        rest = re.sub(rf"(?ms){start}(?:(?!{start}).)*?{end}", _place(name), rest, count=1)
    rest = without_template(rest)
    # A title of the user's own stays the only one.
    title = "" if re.search("(?m)^# ", rest) else f"# {ours.title}\n\n"
    for name, part in ours.parts.items():
        if _place(name) not in rest:
            rest = f"{rest.rstrip()}\n\n{_place(name)}"
        rest = rest.replace(_place(name), f"{_start(name)}\n\n{title}{part}\n\n{_end(name)}", 1)
        title = ""
    # PEFT drops the final line break whenever it rewrites a card.
    card.text = "\n" + rest.lstrip("\r\n").rstrip() + "\n"
    _merge_data(card.data, ours.data)


def without_template(text: str) -> str:
    """Remove the sections of a template card that nobody has filled in, and the placeholders in the others."""
    known = _template_lines()

    def is_own(line: str) -> bool:
        line = line.strip()
        return bool(line) and line not in known and _TRANSFORMERS not in line

    sections: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if _HEADING.match(line):
            sections.append([])
        sections[-1].append(line)
    kept: list[str] = ["".join(sections[0])]
    needed = 0  # headings of a lower level stay: a section below them stays
    result: list[str] = []
    for lines in reversed(sections[1:]):
        level = len(lines[0]) - len(lines[0].lstrip("#")) or 1  # a part of ours is below no heading
        heading, body = lines[0], lines[1:]
        is_version = heading.strip() == _VERSIONS
        own = [line for line in body if is_own(line) and not (is_version and line.startswith("- PEFT "))]
        if heading.strip() not in known:
            result.append("".join(lines))
        elif own:
            filled = [line for line in body if not line.strip() or not _is_placeholder(line, known)]
            result.append(heading + re.sub(r"(\r?\n){3,}", "\n\n", "".join(filled)))
        elif 1 < level < needed:
            result.append(f"{heading}\n")
        else:
            continue
        needed = level
    return "".join([*kept, *reversed(result)])


@lru_cache(maxsize=1)
def _template_lines() -> frozenset[str]:
    """The lines of an empty card of `huggingface_hub`, which PEFT and transformers write."""
    template = ModelCard.from_template(ModelCardData()).text
    return frozenset({*(line.strip() for line in template.splitlines() if line.strip()), _VERSIONS})


def _is_placeholder(line: str, known: frozenset[str]) -> bool:
    return line.strip() in known and (_PLACEHOLDER in line or line.startswith("<!--"))


def _start(name: str) -> str:
    return f"<!-- prefix-adapter: {name} (generated; text outside of this part is kept) -->"


def _place(name: str) -> str:
    return f"<!-- prefix-adapter: place of {name} -->"


def _end(name: str) -> str:
    return f"<!-- prefix-adapter: end of {name} -->"


def _merge_data(data: Any, ours: Mapping[str, Any]) -> None:
    base, tags = data.get("base_model"), [tag for tag in data.get("tags") or () if isinstance(tag, str)]
    if isinstance(base, str) and not hub_name(base):
        # The Hub rejects a card whose base model is a local path.
        data["base_model"] = None
    # PEFT names the base model in a tag, be it a path or not.
    tags = [tag for tag in tags if not tag.startswith("base_model:adapter:") or hub_name(tag.split(":", 2)[2])]
    kept = [name for name in (*_LICENSE, "pipeline_tag") if data.get("license" if name in _LICENSE else name)]
    for name, value in ours.items():
        if value is None or name in (*kept, "tags"):
            continue
        earlier = data.get(name)
        data[name] = sorted({*earlier, *value}) if isinstance(value, list) and isinstance(earlier, list) else value
    data["tags"] = sorted({*tags, *ours["tags"]})
