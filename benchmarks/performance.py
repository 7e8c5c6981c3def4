"""How fast, and in how much memory: P-Tuning v2 beside other methods, and beside the least that it could cost.

    python benchmarks/performance.py --output runs/performance.json
    python benchmarks/performance.py --output runs/performance.json --report docs/performance.md

On a GPU add `--device cuda`, and `--precision tf32` or `bf16`. Each section can be run by itself (`--sections`); what
is in the output already is replaced. Arms take turns step by step in one process, so that whatever else the machine
does meets all of them; peak memory is measured in a process for each arm. On a CPU one thread is used.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

# The C library gives large blocks back to the system and pays for each of their pages again: noise in every step.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PERFORMANCE_STARTED" not in os.environ:  # the C library reads them once, at the start
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PERFORMANCE_STARTED": "1"})

import peft
import torch
import transformers
from arms import ARMS, CONFIGS, base_model, build
from peft import PeftModel
from transformers.cache_utils import DynamicCache, StaticCache

# The rows of the seed's table: virtual tokens and the MLP's width.
ROWS = [(20, None), (100, None), (200, None), (20, 512), (100, 512), (200, 512), (200, 768)]
CONTEXTS = (64, 1024, 4096)
GROWTH = {"n": (1, 32, 128, 512), "batch": (1, 4, 16), "tokens": (32, 128, 448), "layers": (1, 2, 4, 6)}


class Bench:
    """A device, a precision, and how to time on it."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"

    def autocast(self):
        """What a step runs under."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.precision == "bf16" else nullcontext()

    def run(self, model, **inputs):
        """A forward without gradients."""
        with torch.inference_mode(), self.autocast():
            model(**inputs)

    def seconds(self, step):
        """Of one call."""
        if self.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @staticmethod
    def result(times, **about):
        """The median, and the distance of the quartiles."""
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return {**about, "seconds": statistics.median(times), "spread": high - low}

    def compare(self, steps, rounds=None, **about):
        """Each step in turn, round by round: the median of each, and the distance of its quartiles."""
        times = {arm: [] for arm in steps}
        rounds = rounds or self.args.rounds
        for number in range(rounds + self.args.warmup):
            for arm, step in steps.items():
                seconds = self.seconds(step)
                if number >= self.args.warmup:
                    times[arm].append(seconds)
        results = [self.result(found, **about, arm=arm) for arm, found in times.items()]
        print(json.dumps({**about, **{r["arm"]: round(1e3 * r["seconds"], 3) for r in results}}), flush=True)
        return results


def batch_of(config, device, batch=32, tokens=128):
    """Random input, all of one length, with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 5000, (batch, tokens), generator=generator).to(device)
    labels = ids if config.model_type == "llama" else torch.arange(batch, device=device) % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def training_step(bench, arm, model, batch):
    """A step of training: forward, loss, backward, AdamW. `frozen` gives gradients to the head alone."""
    model.to(bench.device).train()
    if arm == "full":
        model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step():
        with bench.autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(bench):
    """A training step of every arm, for every row of the seed's table."""
    results = []
    for shape in bench.args.shapes:
        config = CONFIGS[shape]()
        batch = batch_of(config, bench.device, bench.args.batch)
        for n, width in ROWS if shape != "llama" else ROWS[:1]:
            arms = [arm for arm in ARMS if shape != "llama" or arm not in ("reference",)]
            steps = {arm: training_step(bench, arm, build(arm, config, n, width), batch) for arm in arms}
            about = {"section": "train", "shape": shape, "n": n, "width": width, "batch": bench.args.batch}
            results += bench.compare(steps, **about)
    return results


def memory(bench):
    """Peak memory of a training step, each arm in a process of its own."""
    results = []
    for shape in bench.args.shapes:
        rows = ROWS if shape != "llama" else ROWS[:1]
        specs = [{"n": 20, "width": None, "arm": arm, "any_n": True} for arm in ("frozen", "full", "lora")]
        arms = [arm for arm in ARMS if arm not in ("full", "lora") and (shape != "llama" or arm != "reference")]
        specs += [{"n": n, "width": width, "arm": arm} for n, width in rows for arm in arms]
        for spec in specs:
            spec = {"section": "memory", "shape": shape, "batch": bench.args.batch, **spec}
            command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", json.dumps(spec)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append({**spec, **json.loads(output.splitlines()[-1])})
            print(json.dumps(results[-1]), flush=True)
    return results


def memory_of(bench, spec):
    """The peak of tensors in the second step, above what is there before it, in bytes."""
    config = CONFIGS[spec["shape"]]()
    batch = batch_of(config, bench.device, bench.args.batch)
    step = training_step(bench, spec["arm"], build(spec["arm"], config, spec["n"], spec["width"]), batch)
    step()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with Tracked() as peak_of:
            step()
        peak = peak_of()
    print(json.dumps({"peak": peak}))


class Tracked:
    """Counts the bytes of the tensors that are alive, from inside: what a step holds, whatever the C library does."""

    def __enter__(self):
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self.peak

    def __exit__(self, *error):
        self.profile.__exit__(*error)

    def peak(self):
        """The most that was allocated at a time, above the start."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        alive = most = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            alive += event["args"]["Bytes"]
            most = max(most, alive)
        return most


def infer(bench):
    """A forward of an encoder with a prefix of 20, and without one."""
    results = []
    for shape in (shape for shape in bench.args.shapes if shape != "llama"):
        config = CONFIGS[shape]()
        batch = batch_of(config, bench.device, bench.args.batch)
        del batch["labels"]
        steps = {}
        for arm in ("frozen", "peft", "reference", "ours", "floor"):
            steps[arm] = partial(bench.run, build(arm, config).to(bench.device).eval().requires_grad_(False), **batch)
        results += bench.compare(steps, section="infer", shape=shape, n=20, batch=bench.args.batch)
    return results


def decode(bench):
    """Tokens of a decoder one by one behind a context; the base model has the n tokens more in its cache.

    As in `generate`, where PEFT's wrapper hands over to the model inside once and not for each token.
    """
    config, n, results = CONFIGS["llama"](), 20, []
    wrapped = {
        arm: build(arm, config, n).to(bench.device).eval().requires_grad_(False) for arm in ("ours", "peft", "lora")
    }
    models = {
        "base": base_model(config).to(bench.device).eval().requires_grad_(False),
        "peft": wrapped["peft"].base_model,
    }
    models |= {arm: wrapped[arm].base_model.model for arm in ("ours", "lora")}
    tokens = torch.randint(5, 5000, (1, max(CONTEXTS) + n), generator=torch.Generator().manual_seed(0)).to(
        bench.device
    )

    def first(arm, context, kind):
        """The cache behind the context."""
        own = context + n if arm == "base" else context
        if arm == "peft":
            cache = wrapped[arm].get_prompt(batch_size=1)
        elif kind == "static":
            cache = StaticCache(config, own + 5 * bench.args.rounds + 64)
        else:
            cache = DynamicCache(config=config)
        bench.run(models[arm], input_ids=tokens[:, :own], past_key_values=cache, logits_to_keep=1)
        return cache

    for context in CONTEXTS:
        about = {"shape": "llama", "n": n, "context": context}
        firsts = {arm: partial(first, arm, context, "dynamic") for arm in models}
        results += bench.compare(firsts, rounds=min(3, bench.args.rounds), section="first token", **about)
        for kind in ("dynamic", "static"):
            caches = {arm: first(arm, context, kind) for arm in models if kind == "dynamic" or arm != "peft"}
            steps = {
                arm: partial(bench.run, models[arm], input_ids=tokens[:, :1], past_key_values=cache, logits_to_keep=1)
                for arm, cache in caches.items()
            }
            results += bench.compare(steps, rounds=4 * bench.args.rounds, section="decode", cache=kind, **about)
    return results


def load(bench):
    """Loading an adapter of bert-base onto a base model in memory, and switching between two that are loaded."""
    config = CONFIGS["multilingual"]()
    config.vocab_size = 30522
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in ("ours", "lora"):
            build(arm, config).save_pretrained(f"{folder}/{arm}")
        models = {
            arm: PeftModel.from_pretrained(base_model(config), f"{folder}/{arm}").to(bench.device)
            for arm in ("ours", "lora")
        }
        count = iter(range(10**6))

        def loading(arm):
            def step():
                name = f"a{next(count)}"
                models[arm].load_adapter(f"{folder}/{arm}", name)
                loaded[arm] = name

            return step

        loaded, times = {}, {"ours": [], "lora": []}
        for number in range(bench.args.rounds + bench.args.warmup):
            for arm, found in times.items():
                seconds = bench.seconds(loading(arm))
                models[arm].delete_adapter(loaded[arm])
                if number >= bench.args.warmup:
                    found.append(seconds)
        for arm, model in models.items():
            results.append(bench.result(times[arm], section="load", n=20, arm=arm))
            model.load_adapter(f"{folder}/{arm}", "other")
        print(json.dumps(results), flush=True)

        def switching(model):
            names = iter(["other", "default"] * 10**5)
            return lambda: model.set_adapter(next(names))

        steps = {arm: switching(model) for arm, model in models.items()}
        results += bench.compare(steps, rounds=bench.args.rounds * 4, section="switch", n=20)
    return results


def growth(bench):
    """A training step as one thing grows: prefix, batch, input, layers with a prefix."""
    results = []
    for name, values in GROWTH.items():
        for value in values:
            config = CONFIGS["minilm"]()
            settings = {"n": 20, "batch": 8, "tokens": 128, "layers": config.num_hidden_layers, name: value}
            config.num_hidden_layers = settings["layers"]
            batch = batch_of(config, bench.device, settings["batch"], settings["tokens"])
            steps = {
                arm: training_step(bench, arm, build(arm, config, settings["n"]), batch)
                for arm in ("ours", "floor", "frozen")
            }
            results += bench.compare(steps, section="growth", shape="minilm", grows=name, **settings)
    return results


SECTIONS = {
    "train": train,
    "memory": memory,
    "infer": infer,
    "decode": decode,
    "load": load,
    "growth": growth,
}


def git_commit():
    """The commit, and whether there is more."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON with all figures; added to")
    parser.add_argument("--report", type=Path, help="write the tables to this page, and measure nothing")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=CONFIGS, default=["minilm"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(Bench(args), json.loads(args.memory_of))
        return
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    if args.report:
        from report import page, plot

        args.report.write_text(page(known), encoding="utf-8")
        if any(each["section"] == "growth" for each in known):
            plot(known, args.report.with_name("performance-growth.png"))
        return
    bench = Bench(args)
    machine = torch.cuda.get_device_name() if bench.cuda else f"{platform.machine()} CPU, one thread"
    made = {
        "machine": machine,
        "precision": args.precision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "commit": git_commit(),
    }
    for name in args.sections:
        started = time.perf_counter()
        found = [{**each, **made} for each in SECTIONS[name](bench)]

        def about(each):
            return [each.get(key) for key in ("section", "shape", "machine", "precision")]

        replaced = [about(each) for each in found]
        known = [each for each in known if about(each) not in replaced] + found
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(known, indent=1), encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
