"""Write docs/backbones.md from the results of a run: `python tests/conformance/table.py results.json`."""

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

This page is written by a command, from its results:

```bash
python tests/conformance/run.py --json results.json && python tests/conformance/table.py results.json
```

It holds the adapter against {checks} checks on a tiny random model of every text model type of
transformers {transformers} (peft {peft}, torch {torch}, CPU), for each of its tasks: {pairs} combinations.
Of {types} types {works} work, {refused} are refused at wrap time with the reason, {failed} fail a check, and
{unbuilt} could not be built here.

A check is skipped where it does not apply, or where the backbone itself fails it without an adapter. What each one
does is said by its docstring in `tests/conformance/checks.py`:

{descriptions}

## Known limits

- State-space, convolution and linear-attention layers of hybrids have no keys and values and get no prefix; wrapping
  says which. The same holds for layers that attend to another layer's keys and values (Gemma 3n, Gemma 4): they see
  that layer's prefix.
- Models that hand keys and values on from layer to layer cannot be trained with *reentrant* gradient checkpointing,
  which would lose gradients: that is an error which says so.
- `attn_implementation="flex_attention"` is refused, and so is flash attention with a sliding window.
- MPT's ALiBi biases are the same for all rows of a batch, so rows that are padded on the left by different lengths are
  refused in the forward; Bloom's and Falcon's are not.
- A left-padded row equals the row alone where `position_ids` say where its tokens are, as `generate` does, and without
  them on backbones with rotary or ALiBi positions. RoFormer takes no `position_ids`: pad it on the right. With
  `shift_positions=True` padding counts, as in PEFT.
- A token generated beyond the last learned position ends in PyTorch's own index error, as without an adapter.

## When a newer transformers refuses everything

transformers renames arguments now and then: what was `past_key_values` until 5.23 is `cache` in 5.24. The cache is
found by its type, or by what the probe hands over: another name alone changes nothing, another kind of cache may. The
package is bounded above by the newest minor version of transformers that passes the suite (`pip show prefix-adapter`).
With a newer one, installed in spite of the bound, a refusal ends with the versions that were tested and the command
that installs them. `bash tests/newest.sh` in a checkout installs the newest of everything and runs the suite.

## Types that work

{table}

## Types that are refused

{refusals}

## Not built

{unbuilt_list}
"""


def main() -> None:
    """Write the page."""
    results = json.loads(Path(sys.argv[1]).read_text())
    by_type = defaultdict(list)
    for result in results:
        by_type[result["type"]].append(result)
    groups: dict[str, dict] = {"works": {}, "refused": {}, "failed": {}, "not built": {}}
    for name, rows in sorted(by_type.items()):
        states = {row["status"] for row in rows}
        status = next(s for s in ("failed", "works", "refused", "not built") if s in states)
        groups[status][name] = rows
    table = ["| type | tasks | prefix in front of | checks passed |", "|---|---|---|---|"]
    for name, rows in {**groups["works"], **groups["failed"]}.items():
        tasks = ", ".join(row["task"] for row in rows if row["status"] in ("works", "failed"))
        kinds = sorted({kind for row in rows for kind in row.get("kinds", [])})
        without = sorted({index for row in rows for index in row.get("without", [])})
        note = f"; layers {without} of the tiny model have none" if without else ""
        passed = sum(said == "pass" for row in rows for said in row["checks"].values())
        failed = {check for row in rows for check, said in row["checks"].items() if said.startswith("FAIL")}
        said = f"{passed}; FAILED: {', '.join(sorted(failed))}" if failed else passed
        table.append(f"| {name} | {tasks} | {', '.join(kinds)}{note} | {said} |")
    refusals = defaultdict(list)
    for name, rows in groups["refused"].items():
        reason = rows[0]["why"].split("cannot take a prefix: ")[-1].split(" P-Tuning v2 puts")[0]
        refusals[reason if reason.startswith("none of") else f"{name}: {reason}"].append(name)
    lines = [
        f"- {reason[0].upper()}{reason[1:]} {', '.join(names)}" if len(names) > 1 else f"- {reason}"
        for reason, names in sorted(refusals.items(), key=lambda item: -len(item[1]))
    ]
    PAGE.parent.mkdir(exist_ok=True)
    page = HEAD.format(
        checks=len(CHECKS), transformers=transformers.__version__, peft=peft.__version__, torch=torch.__version__,
        pairs=len(results), types=len(by_type), works=len(groups["works"]), refused=len(groups["refused"]),
        failed=len(groups["failed"]), unbuilt=len(groups["not built"]),
        descriptions="\n".join(f"- `{name}`: {' '.join(check.__doc__.split())}" for name, check in CHECKS.items()),
        table="\n".join(table), refusals="\n".join(lines),
        unbuilt_list="\n".join(f"- {n}: {' '.join(r[0]['why'].split())}" for n, r in groups["not built"].items()),
    )  # fmt: skip
    PAGE.write_text(page)
    print(f"{PAGE}: {len(groups['works'])} work, {len(groups['refused'])} refused, {len(groups['failed'])} failed")


if __name__ == "__main__":
    main()
