"""Write docs/backbones.md from the results of a run: `python tests/conformance/table.py results.json`.

Add `--first-task` if the run had this option.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import peft
import torch
import transformers
from checks import CHECKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"
HEAD = """# Backbones

This page lists the model types that work, those that are rejected with the reason, and the known limits. It was
written by this command:

```bash
python tests/conformance/run.py --modality all{options} --json results.json
python tests/conformance/table.py results.json{first}
```

The command runs {checks} checks on a tiny random model of every model type of transformers {transformers} (peft
{peft}, torch {torch}, CPU), for {tasks}, with both entry points: `entry_point="cache"`, the default, and
`entry_point="attention"` ([the method](method.md)). These are {pairs} combinations.

{counts}

A type counts for what its models read. A model that reads images, sound, videos or time series is run with random
ones, in the middle of a text where it reads both. (A few take a text alone in this run: those whose images need more
inputs than the run can make.)

A check is skipped if it does not apply, or if the backbone fails it without an adapter. The checks stand in
`tests/conformance/checks.py`:

{descriptions}

## Known limits

- In hybrids, state-space, convolution and linear-attention layers have no keys and values, and get no prefix. Wrapping
  names these layers. Layers that attend to another layer's keys and values (Gemma 3n, Gemma 4) get no prefix of their
  own: they attend to that layer's prefix.
- Models that pass keys and values from layer to layer cannot be trained with *reentrant* gradient checkpointing, which
  would lose gradients. There is an error that says so.
- `attn_implementation="flex_attention"` is rejected, and so is flash attention with a sliding window.
- MPT's ALiBi biases are the same for all rows of a batch. Rows that are padded on the left by different lengths are
  therefore rejected in the forward pass. Bloom and Falcon support such rows.
- A left-padded row equals the row alone if `position_ids` skip the padding, as in `generate`. Backbones with rotary or
  ALiBi positions do not need them. RoFormer takes no `position_ids`: pad it on the right. With `shift_positions=True`
  padding counts as positions, as in PEFT.
- Vision-language models with multi-axis positions (Qwen2-VL and similar) compute the positions of images themselves,
  and these are kept. Rows padded on the left are correct with images and with text alone.
- With `entry_point="attention"`, a position bias is 0 in the prefix's columns (T5, BEiT, DeBERTa). Modules that use
  the attention interface for a part of attention only (GPT-2, sparse attention) are rejected. A module of another part
  of the model that computes attention itself (GIT's text layers) is named in a warning.
- Image encoders that receive the patches of all images in one row have no rows to mix adapters in: `adapter_names` is
  an error there.
- Tensor parallelism (`tp_plan`) works where transformers has a plan; see [Many processes](distributed.md).
- A token generated beyond the last trained position raises PyTorch's own index error, as without an adapter.

## If a newer transformers rejects every model

transformers sometimes renames arguments: `past_key_values` of 5.23 is `cache` in 5.24. The package finds the cache by
its type, or as the object that the probe passed in. A new name alone therefore changes nothing, but a new kind of
cache may. The newest minor version of transformers that passes the suite is the upper bound of the dependency (see
`pip show prefix-adapter`). If a newer one is installed anyway, the error names the tested versions and the command
that installs them. `bash tests/newest.sh` in a checkout installs the newest released versions and runs the suite.

## If the inputs of a model are not known

Wrapping runs a model once, on inputs that are made from its config: token ids, pixels, mel features, a waveform or
time series. An error names the inputs of that run. If they are not what the model needs, give an example of a batch:

```python
from prefix_adapter import PrefixTuningV2Config, example_inputs, get_peft_model

with example_inputs(**batch):  # the arguments of the model's `forward`
    model = get_peft_model(model, PrefixTuningV2Config())
```

The same works around `PeftModel.from_pretrained`. The values do not matter, and a short batch is enough.

{tables}

## Types that are rejected

{refusals}

## Not built

{unbuilt_list}
"""


GROUPS = ("works", "refused", "failed", "not built")


def main() -> None:
    """Write docs/backbones.md."""
    results = json.loads(Path(sys.argv[1]).read_text())
    by_modality: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_modality[result.get("modality", "text")][result["type"]].append(result)
    counts = [
        "| reads | types | work | through the cache | at the attention function | rejected with a reason | "
        "fail a check | not built |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ran = {check for result in results for check in result["checks"]}
    first = " --first-task" if "--first-task" in sys.argv else ""
    chosen = "" if ran == set(CHECKS) else f" --checks {' '.join(name for name in CHECKS if name in ran)}"
    tables, refusals, unbuilt = [], defaultdict(list), []
    for modality, by_type in sorted(by_modality.items(), key=lambda item: (item[0] != "text", item[0])):
        groups = group(by_type)
        reads = modality.replace("+", ", ")
        entered = [sum(works_at(entry, rows) for rows in groups["works"].values()) for entry in ("cache", "attention")]
        numbers = [len(by_type), len(groups["works"]), *entered, *(len(groups[name]) for name in GROUPS[1:])]
        counts.append(f"| {reads} | " + " | ".join(map(str, numbers)) + " |")
        if groups["works"] or groups["failed"]:
            tables.append(f"## Types that work: {reads}\n\n{make_table({**groups['works'], **groups['failed']})}")
        for name, rows in groups["refused"].items():
            reason = rows[-1]["why"].split("cannot take a prefix: ")[-1].split(" P-Tuning v2 puts")[0]
            refusals[reason if reason.startswith("none of") else f"{name}: {reason}"].append(name)
        unbuilt += [f"- {name}: {' '.join(rows[0]['why'].split())}" for name, rows in groups["not built"].items()]
    PAGE.parent.mkdir(exist_ok=True)
    page = HEAD.format(
        checks=len(ran), tasks="its first task" if first else "each of its tasks", first=first, options=first + chosen,
        transformers=transformers.__version__, peft=peft.__version__, torch=torch.__version__,
        pairs=len(results), counts="\n".join(counts), tables="\n\n".join(tables),
        descriptions="\n".join(
            f"- `{name}`: {' '.join(check.__doc__.split())}" for name, check in CHECKS.items() if name in ran
        ),
        refusals="\n".join(
            f"- {reason[0].upper()}{reason[1:]} {', '.join(names)}" if len(names) > 1 else f"- {reason}"
            for reason, names in sorted(refusals.items(), key=lambda item: -len(item[1]))
        ),
        unbuilt_list="\n".join(unbuilt),
    )  # fmt: skip
    PAGE.write_text(page)
    print("\n".join([str(PAGE), *counts]))


def group(by_type: dict[str, list]) -> dict[str, dict[str, list]]:
    """Sort types by the status of their tasks: one that fails makes the type fail, one that works makes it work."""
    groups: dict[str, dict[str, list]] = {name: {} for name in GROUPS}
    for name, rows in sorted(by_type.items()):
        states = {row["status"] for row in rows}
        groups[next(state for state in ("failed", *GROUPS) if state in states)][name] = rows
    return groups


def make_table(types: dict[str, list]) -> str:
    """Return a table of types with their tasks, the kinds of attention that take a prefix, and the checks passed."""
    table = ["| type | tasks | prefix in front of | cache | attention |", "|---|---|---|---|---|"]
    for name, rows in types.items():
        tasks = ", ".join(dict.fromkeys(row["task"] for row in rows if row["status"] in ("works", "failed")))
        kinds = sorted({kind for row in rows for kind in row.get("kinds", [])})
        without = sorted({index for row in rows for index in row.get("without", [])})
        note = f"; layers {without} of the tiny model have none" if without else ""
        cells = [describe_checks([row for row in rows if get_entry(row) == entry]) for entry in ("cache", "attention")]
        table.append(f"| {name} | {tasks} | {', '.join(kinds)}{note} | {' | '.join(cells)} |")
    return "\n".join(table)


def get_entry(row: dict) -> str:
    """Return the entry point of a result."""
    return row.get("entry_point", "cache")


def works_at(entry: str, rows: list) -> bool:
    """Return whether a type works with an entry point."""
    return any(row["status"] == "works" for row in rows if get_entry(row) == entry)


def describe_checks(rows: list) -> str:
    """Return how many checks passed, and which failed; a dash if the type is rejected or was not built."""
    passed = sum(said == "pass" for row in rows for said in row["checks"].values())
    failed = {check for row in rows for check, said in row["checks"].items() if said.startswith("FAIL")}
    if failed:
        return f"{passed}; FAILED: {', '.join(sorted(failed))}"
    return str(passed) if any(row["status"] == "works" for row in rows) else "-"


if __name__ == "__main__":
    main()
