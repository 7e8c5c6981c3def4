"""The sections of gpu.sh that measure time and memory, with the functions and the format of performance.py."""

import gc
import json
import traceback
from unittest import mock

import performance
import torch

# The arms that are compared with the KLUE-NLI table; see arms.py.
ARMS = ("full", "lora", "peft", "ours", "floor")
SAME = ("full", "lora", "frozen")  # do not depend on the number of virtual tokens
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"vocab_size": 5000}


def klue_nli_table(args, precision):
    """Measure the rows of the KLUE-NLI table in its own shape: a check of time and a check of memory for each row."""
    bench = Measuring(args, precision, ["multilingual"], batch=2 if args.tiny else 32)
    rows = performance.rows_of("multilingual")
    if args.tiny:
        rows = [rows[0], rows[-1]] if precision == "fp32" else rows[:1]
    for n, width in rows:
        yield f"time, n {n}, MLP {width or '-'}", bench.check(train_row, "multilingual", n, width)
    if args.tiny and precision != "fp32":
        return
    yield "memory, whatever n", bench.check(memory_row, "multilingual", SAME, {"any_n": True})
    for n, width in rows[:1] if args.tiny else rows:
        row = {"n": n, "width": width}
        yield (
            f"memory, n {n}, MLP {width or '-'}",
            bench.check(memory_row, "multilingual", ("peft", "ours", "floor"), row),
        )


def decoder(args, precision):
    """Measure a decoder's training step, its first token and the following tokens."""
    bench = Measuring(args, precision, ["llama"], batch=2 if args.tiny else 32)
    for n, width in performance.rows_of("llama"):
        yield f"training step, n {n}, MLP {width or '-'}", bench.check(train_row, "llama", n, width)
    for context in (64,) if args.tiny else performance.CONTEXTS:
        yield f"tokens behind {context}", bench.check(tokens, context, ("dynamic", "static"))


def decoder_compiled(args, precision):
    """Measure the tokens of a compiled decoder with a static cache."""
    bench = Measuring(args, precision, ["llama"], batch=1)
    context = 64 if args.tiny else 1024
    yield f"tokens behind {context}", bench.check(tokens, context, ("compiled",), limit=150)


class Measuring(performance.Bench):
    """A bench that makes checks and keeps their results in OUT/performance.json."""

    def __init__(self, args, precision, shapes, batch):
        device = "cpu" if args.tiny else "cuda"
        arguments = ["--output", str(args.out / "performance.json"), "--device", device, "--precision", precision]
        arguments += [
            "--batch",
            str(batch),
            "--rounds",
            "2" if args.tiny else "7",
            "--warmup",
            "1" if args.tiny else "3",
        ]
        super().__init__(performance.options().parse_args([*arguments, "--shapes", *shapes]))
        self.tiny = args.tiny
        if self.tiny:
            self.compile = {"backend": "eager"}
        self.made = performance.made_by(self)
        self.kept = {}  # (shape, arm) -> training step, for arms that are the same in all rows

    def check(self, measure, *arguments, limit=None):
        """Return a check that measures and saves the results, even if a part of it failed."""

        def call(figures):
            failed = []
            with mock.patch.object(performance, "config_of", self.config_of):
                for each in measure(self, failed, *arguments):
                    self.save(each)
                    figures.setdefault("results", 0)
                    figures["results"] += 1
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
            if failed:
                raise RuntimeError("\n".join(failed))

        if limit:
            call.limit = limit
        return call

    def config_of(self, shape, config_of=performance.config_of):
        """Return the configuration of a shape, or a tiny version of it."""
        config = config_of(shape)
        if self.tiny:
            for name, value in SMALL.items():
                setattr(config, name, value)
            if shape == "llama":
                config.head_dim, config.num_key_value_heads, config.num_hidden_layers = 8, 2, 1
        return config

    def save(self, result):
        """Add a result to the file; replace an earlier result of the same setting."""
        path = self.args.output
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        new = {**result, **self.made}

        def setting(each):
            return {key: value for key, value in each.items() if key not in ("seconds", "peak", "before")}

        known = [each for each in known if setting(each) != setting(new)]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([*known, new]), encoding="utf-8")
        unfinished.replace(path)


def attempt(failed, arm, function, *arguments, **settings):
    """Return the function's result, or `None` after adding the error to `failed`, so that other arms still run."""
    try:
        return function(*arguments, **settings)
    except Exception:
        failed.append(f"{arm}: {traceback.format_exc(limit=-8)}")
        return None


def train_row(bench, failed, shape, n, width):
    """Time a training step of every arm."""
    steps = {}
    for arm in ARMS:
        step = bench.kept.get((shape, arm))
        if step is None:
            step = attempt(failed, arm, performance.step_of, bench, arm, shape, n, width)
            if step is None or attempt(failed, arm, bench.seconds, step) is None:
                continue
            if arm in SAME:
                bench.kept[shape, arm] = step
        steps[arm] = step
    return performance.compare_steps(bench, steps, shape, n, width)


def memory_row(bench, failed, shape, arms, row):
    """Measure the peak memory of a training step of each arm, and the memory in use before it."""
    for arm in arms:
        spec = {"section": "memory", "shape": shape, "batch": bench.args.batch, "arm": arm, "checkpointing": False}
        found = attempt(failed, arm, performance.measure_peak, bench, {**spec, **row})
        if found is not None:
            yield {**spec, **row, **found}


def tokens(bench, failed, context, kinds):
    """Measure the first token after a context, and the following tokens, for each kind of cache."""
    return performance.tokens_of(bench, performance.config_of("llama"), (context,), kinds)
