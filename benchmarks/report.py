"""The figures of performance.py as a page: tables of ratios, and plots of growth."""

from itertools import groupby

WORDS = {
    "full": "full fine-tuning",
    "lora": "LoRA r=8",
    "peft": "PEFT PREFIX_TUNING",
    "reference": "reference",
    "ours": "ours",
    "third": "ours, last third",
    "floor": "floor",
    "frozen": "frozen backbone",
    "base": "base, n tokens more",
}
HEAD = """# Performance

<!-- Written by benchmarks/performance.py; the text is in benchmarks/report.py. -->

Everything is a ratio of two medians, taken in turns in one process (memory: in a process for each arm), by

```bash
python benchmarks/performance.py --output runs/performance.json
python benchmarks/performance.py --output runs/performance.json --report docs/performance.md
```

*floor* is the same frozen backbone with bare leaf tensors of keys and values in front of attention, no encoder and no
hook: the least that a prefix can cost. *reference* is P-Tuning v2 as in the paper, with the MLP run for every row of
the batch. *frozen backbone* has no prefix, and gradients go through it to its embeddings. Input is random, all of one
length, 128 tokens in training; dropout on the prefix is off. *n* is the number of virtual tokens, *MLP* the width of
its hidden layer. ± is half the distance of the quartiles, in the same unit.
"""


def page(results):
    """The page for all results."""
    parts = [HEAD]
    for (machine, precision), group in _by(results, "machine", "precision"):
        own = list(group)
        versions = ", ".join(f"{name} {number}" for name, number in own[0]["versions"].items())
        commits = ", ".join(sorted({each["commit"] for each in own}))
        parts.append(f"## {machine}, {precision}\n\n{versions}; commit {commits}.\n")
        for section, write in SECTIONS.items():
            found = [each for each in own if each["section"] == section]
            if found:
                parts.append(write(found))
    return "\n".join(parts)


def _by(results, *names):
    def key(each):
        return tuple(str(each.get(name)) for name in names)

    return groupby(sorted(results, key=key), key)


def _table(columns, rows):
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _rows(results, value, names):
    """The results of each setting, by arm, in the order in which they were taken."""
    order = {}
    for each in results:
        order.setdefault(tuple(each.get(name) for name in names), {})[each["arm"]] = each
    return [(setting, {arm: each[value] for arm, each in arms.items()}, arms) for setting, arms in order.items()]


def _ratios(results, value, base, unit, title, text, names=("shape", "n", "width")):
    rows = _rows(results, value, names)
    # What does not depend on the prefix is measured once.
    same = {arm: full[arm] for _, _, full in rows for arm in full if full[arm].get("any_n")}
    rows = [
        (about, {**{arm: each[value] for arm, each in same.items() if each["shape"] == about[0]}, **values}, full)
        for about, values, full in rows
        if any(not each.get("any_n") for each in full.values())
    ]
    arms = [arm for arm in WORDS if any(arm in values for _, values, _ in rows) and arm != base]
    scale = {"ms": 1e3, "MiB": 2**-20}[unit]
    columns = [*(("MLP" if name == "width" else name) for name in names), f"{WORDS[base]}, {unit}"]
    lines = []
    for setting, values, full in rows:
        about = [str(each if each is not None else "-") for each in setting]
        spread = full.get(base, {}).get("spread")
        first = f"{scale * values[base]:.3g}" + (f" ± {scale * spread / 2:.2g}" if spread is not None else "")
        lines.append([*about, first, *(f"{values[arm] / values[base]:.3f}" if arm in values else "-" for arm in arms)])
    return f"### {title}\n\n{text}\n\n" + _table([*columns, *(WORDS[arm] for arm in arms)], lines)


def _train(results):
    return _ratios(results, "seconds", "floor", "ms", "A training step", "Time over the floor's.")


def _memory(results):
    text = (
        "Peak of the tensors that a step makes, over that of the same frozen backbone with its head alone in training."
    )
    return _ratios(results, "peak", "frozen", "MiB", "Memory of a training step", text)


def _infer(results):
    return _ratios(
        results, "seconds", "floor", "ms", "A forward of an encoder", "Time over the floor's.", ("shape", "n")
    )


def _decode(results):
    text = "Time of a token over that of the base model with n tokens more in its cache."
    return _ratios(results, "seconds", "base", "ms", "A token of a decoder", text, ("n", "context", "cache"))


def _first(results):
    text = "Time until the context is in the cache, over that of the base model with n tokens more."
    return _ratios(results, "seconds", "base", "ms", "The first token", text, ("n", "context"))


def _load(results):
    text = "Loading an adapter of bert-base onto a base model in memory, over the time for one of LoRA r=8."
    return _ratios(results, "seconds", "lora", "ms", "Loading", text, ("n",))


def _switch(results):
    return _ratios(results, "seconds", "lora", "ms", "Switching", "`set_adapter`, over that of LoRA r=8.", ("n",))


def _growth(results):
    text = "Time of a training step over the floor's, as one thing grows: virtual tokens, batch, input, layers."
    text += "\n\n![Time of a training step](performance-growth.png)"
    names = ("grows", "n", "batch", "tokens", "layers")
    return _ratios(results, "seconds", "floor", "ms", "Growth", text, names)


def plot(results, path):
    """Seconds of a training step over each thing that grows."""
    import matplotlib.pyplot as plt

    grown = [each for each in results if each["section"] == "growth"]
    names = list(dict.fromkeys(each["grows"] for each in grown))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for (arm, machine), group in _by([each for each in grown if each["grows"] == name], "arm", "machine"):
            points = sorted((each[name], each["seconds"]) for each in group)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{WORDS[arm]}, {machine}")
        axis.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=120)


SECTIONS = {
    "train": _train,
    "memory": _memory,
    "infer": _infer,
    "decode": _decode,
    "first token": _first,
    "load": _load,
    "switch": _switch,
    "growth": _growth,
}
