"""Write the results of performance.py as a page, and insert the results of gpu.sh into it.

python benchmarks/report.py OUT docs/performance.md benchmarks/performance_notes.md

This replaces the text between the two comments of these pages by the tables of the run in OUT.

python benchmarks/report.py benchmarks/growth_results.json docs/performance-growth.png

This draws the plot of the page anew.
"""

import json
import statistics
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA r=8",
    "peft": "PEFT PREFIX_TUNING",
    "reference": "reference",
    "ours": "ours",
    "low_rank": "ours, n/2 and `lora_r=2`",
    "third": "ours, last third",
    "floor": "floor",
    "floor_third": "floor, last third",
    "frozen": "frozen backbone",
    "base": "base, n more tokens",
}
# Published results of kobongsoo/BERT on KLUE-NLI (docs/recipes.md): time of an epoch and memory over those of full
# fine-tuning, by virtual tokens and width of the MLP.
KLUE_NLI = {
    (20, None): (50 / 110, 5374 / 8194),
    (20, 512): (60 / 110, 5507 / 8194),
    (100, None): (73 / 110, 6411 / 8194),
    (100, 512): (77 / 110, 6546 / 8194),
    (200, 512): (93 / 110, 7691 / 8194),
    (200, 768): (95 / 110, 7791 / 8194),
}
KLUE_NLI_SHAPE = ("multilingual", 32)
HEAD = """# Performance

<!-- Written by benchmarks/performance.py; the text is in benchmarks/report.py and benchmarks/performance_notes.md. -->

This page shows what a prefix costs in time and memory, how that cost is kept low, and which targets are missed. In
three sentences:

- A training step with 20 virtual tokens takes as long as the lowest possible cost of a prefix allows (1.02 at most, on
  a CPU), and 0.7 to 0.8 of the time of full fine-tuning.
- Its memory is that of the frozen backbone and 5 to 6% more on an encoder; both time and memory grow with the tokens.
- A generated token takes 0.92 to 1.05 of the base model's time on a CPU, and 1.15 on a GPU with a static cache, where
  LoRA takes 1.22.

All methods take turns in each round, in one process and in a new random order. A ratio of times is the median of the
ratios of the rounds (± is half of the interquartile range). Memory is measured in a separate process for each method.
The figures were made by

```bash
python benchmarks/performance.py --output runs/performance.json
python benchmarks/performance.py --output runs/performance.json --report docs/performance.md
```

- *floor*: the same frozen backbone with plain trainable tensors of keys and values in front of attention, without
  encoder or hook. It is the lowest possible cost of a prefix.
- *reference*: P-Tuning v2 as in the paper, with the MLP run for every row of the batch.
- *frozen backbone*: no prefix; gradients flow through the backbone to its embeddings.
- *last third*: a prefix only in the last third of the layers.
- *A over B*: the ratio of A to B.
- *n*: the number of virtual tokens. *MLP*: the width of its hidden layer.
- *minilm*: all-MiniLM-L6-v2, 22.7 million parameters. *multilingual*: the configuration of
  bert-base-multilingual-cased, 178 million. *llama*: a decoder of 88 million with grouped queries.
- *the KLUE-NLI table*: published time and memory of
  [kobongsoo/BERT](https://github.com/kobongsoo/BERT/tree/master/p-tuning), see [recipes](recipes.md#klue-nli).

The input is random. All rows have one length, 128 tokens in training. Dropout on the prefix is off.
"""


def page(results, notes=""):
    """Return the page for all results."""
    return "\n".join([HEAD, notes, *_machines(results)])


def _machines(results):
    """Return the tables of each machine and precision."""
    parts = []
    for (machine, precision), group in _by(results, "machine", "precision"):
        own = list(group)
        versions = ", ".join(f"{name} {number}" for name, number in own[0]["versions"].items())
        commits = ", ".join(sorted({each["commit"] for each in own}))
        parts.append(f"## {machine}, {precision}\n\n{versions}; commit {commits}.\n")
        parts += [_targets(own), _klue_nli(own)]
        for section, write in SECTIONS.items():
            found = [each for each in own if each["section"] == section]
            if found:
                parts.append(write(found))
    return parts


GPU_START, GPU_END = "<!-- The figures of gpu.sh: -->", "<!-- The end of the figures of gpu.sh. -->"


def gpu_figures(out):
    """Return the results of a run of gpu.sh as a part of the page; `out` is the run's folder."""
    run = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    machine, lines, notes = run["machine"], [], []
    for section in run["sections"]:
        counts = Counter(check["status"] for check in section["checks"])
        known = ("passed", "failed", "skipped")
        rest = sum(number for status, number in counts.items() if status not in known)
        errors = [check["figures"] for check in section["checks"] if check.get("figures")]
        errors = [each.get("worst", each.get("error")) for each in errors]
        errors = [each for each in errors if each is not None]
        worst = f"{max(errors):.2g}" if errors else "-"
        lines.append([section["section"], *(str(counts[status]) for status in known), str(rest), worst])
        for check in section["checks"]:
            reason = check.get("reason") or check.get("error", "").strip().rpartition("\n")[2]
            if reason:
                notes.append((f"{section['section']}: {check['check']}", check["status"], reason))
    versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items())
    cut = " The time was up before the end." if any(line[4] != "0" for line in lines) else ""
    parts = [
        f"## Correctness on {machine.get('device', 'an unknown machine')}\n",
        f"{versions}; {run['seconds']:.0f} seconds.{cut} Errors are the largest, relative to the largest element.\n",
        _table(["section", "passed", "failed", "skipped", "not run", "error"], lines),
    ]
    for status in ("failed", "skipped"):
        # The same reason often holds for many checks.
        found = groupby(sorted((r, n) for n, s, r in notes if s == status), key=lambda each: each[0])
        listed = [f"- {', '.join(name for _, name in group)}: {reason}" for reason, group in found]
        if listed:
            parts.append(f"{status.capitalize()}:\n\n" + "\n".join(listed) + "\n")
    path = out / "performance.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return "\n".join([*parts, *_machines(results)])


def insert(page, figures):
    """Return the page with these figures between its two comments."""
    before, start, rest = page.partition(GPU_START)
    _, end, after = rest.partition(GPU_END)
    if not start or not end:
        raise ValueError(f"the page has no {GPU_START} and {GPU_END}")
    return f"{before}{start}\n\n{figures.strip()}\n\n{end}{after}"


def _by(results, *names):
    def key(each):
        return tuple(str(each.get(name)) for name in names)

    return groupby(sorted(results, key=key), key)


def _table(columns, rows):
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _settings(results, names):
    """Return the results of each setting by arm, in the order of measurement.

    Results that do not depend on the prefix are measured once per shape. They are appended to all settings of the
    shape.
    """
    order = {}
    for each in results:
        if not each.get("any_n"):
            order.setdefault(tuple(each.get(name) for name in names), {})[each["arm"]] = each
    once = [each for each in results if each.get("any_n")]
    for arms in order.values():
        first = next(iter(arms.values()))
        same = (each for each in once if all(each[name] == first[name] for name in ("shape", "batch")))
        arms |= {each["arm"]: each for each in same if each["arm"] not in arms}
    return order


def ratio(one, other, whole=False):
    """Return the median of the ratios of the rounds, and half of their interquartile range.

    For memory, return the ratio and 0. With `whole=True` it includes the memory that was in use before the step.
    """
    if "peak" in one:
        bytes_of = [each["peak"] + (each["before"] if whole else 0) for each in (one, other)]
        return bytes_of[0] / bytes_of[1], 0.0
    pairs = [a / b for a, b in zip(one["seconds"], other["seconds"], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return statistics.median(pairs), (high - low) / 2


def _formatted(value):
    middle, spread = value
    return f"{middle:.3f}" + (f" ± {spread:.3f}" if spread else "")


def _ratios(results, base, title, text, names=("shape", "batch", "n", "width")):
    lines, found = [], _settings(results, names)
    arms = [arm for arm in TITLES if arm != base and any(arm in each for each in found.values())]
    for setting, each in found.items():
        if "peak" in each[base]:
            first = f"{each[base]['peak'] / 2**20:.0f} MiB"
        else:
            middle = 1e3 * statistics.median(each[base]["seconds"])
            first = f"{middle:.0f} ms" if middle > 1000 else f"{middle:.4g} ms"
        about = [str(value if value is not None else "-") for value in setting]
        lines.append([*about, first, *(_formatted(ratio(each[a], each[base])) if a in each else "-" for a in arms)])
    columns = [*("MLP" if name == "width" else name for name in names), TITLES[base], *(TITLES[arm] for arm in arms)]
    return f"### {title}\n\n{text}\n\n" + _table(columns, lines)


def _train(results):
    return _ratios(results, "floor", "A training step", "Time, relative to the floor's.")


def _memory(results):
    plain = [each for each in results if not each.get("checkpointing")]
    text = "Peak memory of a step's tensors, relative to the same frozen backbone of which only the head is trained."
    page = _ratios(plain, "frozen", "Memory of a training step", text)
    saved = []
    for each in results:
        if each.get("checkpointing"):
            names = ("shape", "batch", "arm", "n", "width")
            before = next(p for p in plain if all(p.get(name) == each.get(name) for name in names))
            size = "-" if each.get("any_n") else f"{each['n']}, {each['width'] or '-'}"
            saved.append(
                [each["shape"], str(each["batch"]), TITLES[each["arm"]], size, f"{each['peak'] / before['peak']:.3f}"]
            )
    if saved:
        page += "\nWith gradient checkpointing, relative to the same without it:\n\n"
        page += _table(["shape", "batch", "method", "n, MLP", "memory"], saved)
    return page


def _klue_nli(results):
    """Return the comparison with the KLUE-NLI table: time and memory over full fine-tuning's, in its shape."""
    found = {"train": {}, "memory": {}}
    for section, rows in found.items():
        own = [each for each in results if each["section"] == section and not each.get("checkpointing")]
        for (shape, batch, n, width), arms in _settings(own, ("shape", "batch", "n", "width")).items():
            if (shape, batch) == KLUE_NLI_SHAPE and (n, width) in KLUE_NLI:
                rows[n, width] = arms
    if not any(found.values()):
        return ""
    lines = []
    for (n, width), limits in KLUE_NLI.items():
        line = [str(n), str(width or "-")]
        for limit, rows in zip(limits, found.values(), strict=True):
            arms = rows.get((n, width), {})
            ratios = {
                arm: ratio(each, arms["full"], whole=True) for arm, each in arms.items() if arm in ("ours", "floor")
            }
            line += [f"{limit:.3f}", *(_formatted(ratios[arm]) if arm in ratios else "-" for arm in ("ours", "floor"))]
        lines.append(line)
    text = (
        "Ratios over full fine-tuning, in the shape of that experiment (batch 32, 128 tokens). Its figures are for "
        "epochs on a GPU. Memory here is the total, with weights and the optimizer's state."
    )
    sources = ("published", "ours", "floor")
    columns = ["n", "MLP", *(f"{what}, {source}" for what in ("time", "memory") for source in sources)]
    return f"### Compared with the KLUE-NLI table\n\n{text}\n\n" + _table(columns, lines)


def _infer(results):
    text = "Time, relative to the floor's."
    return _ratios(results, "floor", "A forward of an encoder", text, ("shape", "batch", "n"))


def _decode(results):
    text = "Time of a token, relative to the base model with n more tokens in its cache."
    return _ratios(results, "base", "A token of a decoder", text, ("n", "context", "cache"))


def _first(results):
    text = "Time until the context is in the cache, relative to the base model with n more tokens."
    return _ratios(results, "base", "The first token", text, ("n", "context"))


def _host(results):
    text = (
        "A decoder of the same depth and a width of 96: most of the time is spent in Python and in launching "
        "operations, as when a GPU waits for the host. Time, relative to LoRA r=8."
    )
    return _ratios(results, "lora", "Host time", text, ("what", "n"))


def _load(results):
    text = "Time to load an adapter of BERT-base onto a base model in memory, relative to LoRA r=8."
    return _ratios(results, "lora", "Loading", text, ("n",))


def _switch(results):
    return _ratios(results, "lora", "Switching", "Time of `set_adapter`, relative to LoRA r=8.", ("n",))


def _growth(results):
    text = "Time of a training step, relative to the floor's, as one size grows: virtual tokens, batch, input, depth."
    text += (
        " The plot also has memory, and the number of layers with a prefix. Its sizes are batch 8, 20 virtual tokens,"
    )
    text += " 128 tokens and 6 layers where they do not grow."
    text += "\n\n![Time and memory of a training step](performance-growth.png)"
    beside = [each for each in results if each["grows"] != "prefixed"]
    return _ratios(beside, "floor", "Growth", text, ("grows", "n", "batch", "tokens", "depth"))


def _operations(results):
    text = (
        "Number of tensor operations (launches on a GPU): forward and backward of all-MiniLM, a token of the decoder."
    )
    rows = _settings(results, ("what", "n", "width"))
    arms = [arm for arm in TITLES if any(arm in each for each in rows.values())]
    lines = [
        [what, str(n), str(width or "-"), *(str(each[arm]["operations"]) if arm in each else "-" for arm in arms)]
        for (what, n, width), each in rows.items()
    ]
    return f"### Operations\n\n{text}\n\n" + _table(["", "n", "MLP", *(TITLES[arm] for arm in arms)], lines)


def _targets(results):
    """Return the table of targets and measured values."""
    lines = []

    def add(what, aim, found):
        if found:
            worst = max(found, key=lambda each: each[1][0] / each[2])
            reached = all(value[0] <= limit for _, value, limit in found)
            where = f" ({worst[0]})" if len(found) > 1 else ""
            lines.append([what, aim, f"{_formatted(worst[1])}{where}", "yes" if reached else "**no**"])

    def over(section, one, other, limit, where=lambda each: True, label=lambda each: each["shape"], whole=False):
        """Return the ratios of two arms in the settings of a section, each with its limit."""
        names = ("shape", "batch", "n", "width", "context", "cache")
        own = [e for e in results if e["section"] == section and not e.get("checkpointing")]
        found = []
        for arms in _settings(own, names).values():
            first = next(iter(arms.values()))
            if where(first) and one in arms and other in arms:
                limit_here = limit(first) if callable(limit) else limit
                found.append((label(first), ratio(arms[one], arms[other], whole), limit_here))
        return found

    def size(each):
        return f"{each['shape']}, n {each['n']}, MLP {each['width'] or '-'}"

    def table(n):
        return lambda each: each["n"] == n and each["width"] is None

    def mlp(n=None):
        return lambda each: each["width"] == 512 and n in (None, each["n"])

    add("step over the floor's, table, n 20", "1.03", over("train", "ours", "floor", 1.03, table(20)))
    add("the same, n 200", "1.05", over("train", "ours", "floor", 1.05, table(200)))
    add("the same with an MLP", "1.10", over("train", "ours", "floor", 1.10, lambda each: each["width"], size))
    add("step over PEFT's, n 20, MLP 512", "0.90", over("train", "ours", "peft", 0.90, mlp(20)))
    add("the same, n 200", "0.75", over("train", "ours", "peft", 0.75, mlp(200)))

    def in_klue_nli(each):
        return (each["shape"], each["batch"]) == KLUE_NLI_SHAPE and (each["n"], each["width"]) in KLUE_NLI

    for section, index, title in (("train", 0, "step"), ("memory", 1, "memory")):
        for name, arm in ((f"{title} over full fine-tuning's", "ours"), ("the floor's, for comparison", "floor")):
            limit = _klue_nli_limit(index)
            add(name, "KLUE-NLI's ratio", over(section, arm, "full", limit, in_klue_nli, size, whole=True))
    add("step of the last third over full fine-tuning's", "0.50", over("train", "third", "full", 0.50, label=size))
    add("the floor's, for comparison", "0.50", over("train", "floor_third", "full", 0.50, label=size))
    add("memory over the frozen backbone's, table, n 20", "1.05", over("memory", "ours", "frozen", 1.05, table(20)))
    add("memory over PEFT's", "1", over("memory", "ours", "peft", 1, label=size))
    add("memory over the reference's", "1", over("memory", "ours", "reference", 1, label=size))
    add("forward over the floor's", "1.05", over("infer", "ours", "floor", 1.05))

    def place(each):
        return f"{each['context']} tokens, {each.get('cache', 'first')}"

    add("a token over the base model's", "1.031", over("decode", "ours", "base", 1 / 0.97, label=place))
    add("first token over PEFT's", "1", over("first token", "ours", "peft", 1, label=place))
    add("loading over LoRA's", "0.50", over("load", "ours", "lora", 0.50, label=str))
    add("switching over LoRA's", "0.10", over("switch", "ours", "lora", 0.10, label=str))
    if not lines:
        return ""
    text = "### Targets\n\nThe measured value is the worst of all settings; the setting stands in brackets.\n\n"
    return text + _table(["", "at most", "measured", "reached"], lines)


def _klue_nli_limit(index):
    return lambda each: KLUE_NLI[each["n"], each["width"]][index]


# The panels of the plot: what grows, and the title of its column. The table has all sizes.
GROWTH_PANELS = {"n": "virtual tokens", "tokens": "tokens of a row", "prefixed": "layers with a prefix (of 6)"}
GROWTH_ARMS = {"ours": "prefix", "floor": "lowest possible cost of a prefix", "frozen": "frozen backbone, no prefix"}


def plot(results, path):
    """Plot the time and the memory of a training step over the sizes of `GROWTH_PANELS`, of the first machine."""
    import matplotlib.pyplot as plt

    sections = {"growth": "time of a step (ms)", "growth of memory": "peak memory (MiB)"}
    grown = [each for each in results if each["section"] in sections and each["grows"] in GROWTH_PANELS]
    if not grown:
        return
    first = {name: grown[0][name] for name in ("machine", "precision")}
    grown = [each for each in grown if all(each[name] == value for name, value in first.items())]
    panels = [name for name in GROWTH_PANELS if any(each["grows"] == name for each in grown)]
    size = {"figsize": (3.1 * len(panels), 5.6), "squeeze": False, "layout": "constrained"}
    with plt.rc_context({"font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = plt.subplots(2, len(panels), **size)
        for row, (section, unit) in zip(axes, sections.items(), strict=True):
            row[0].set_ylabel(unit)
            for axis, name in zip(row, panels, strict=True):
                for index, (arm, label) in enumerate(GROWTH_ARMS.items()):
                    own = (
                        each for each in grown if (each["section"], each["grows"], each["arm"]) == (section, name, arm)
                    )
                    if points := sorted((each[name], _height(each)) for each in own):
                        look = {"marker": "os^"[index], "linestyle": ("-", "--", ":")[index], "color": f"C{index}"}
                        axis.plot(*zip(*points, strict=True), **look, label=label)
                axis.set(xlabel=GROWTH_PANELS[name], ylim=(0, None), xlim=(0, None))
        lines, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(f"A training step as one size grows ({first['machine']}, {first['precision']})")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _height(each):
    return each["peak"] / 2**20 if "peak" in each else 1e3 * statistics.median(each["seconds"])


SECTIONS = {
    "train": _train,
    "memory": _memory,
    "infer": _infer,
    "decode": _decode,
    "first token": _first,
    "host": _host,
    "load": _load,
    "switch": _switch,
    "growth": _growth,
    "operations": _operations,
}


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
        sys.exit()
    for path in map(Path, sys.argv[2:]):
        path.write_text(insert(path.read_text(encoding="utf-8"), gpu_figures(Path(sys.argv[1]))), encoding="utf-8")
