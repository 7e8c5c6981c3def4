"""Measure time and memory of P-Tuning v2, of other methods, and of the lowest possible cost of a prefix.

    python benchmarks/performance.py --output runs/performance.json
    python benchmarks/performance.py --output runs/performance.json --report docs/performance.md

On a GPU use `bash benchmarks/gpu.sh`, which selects the measurements that matter there and uses these functions. To
run this script on a GPU, pass `--device cuda` and `--precision tf32` or `bf16`, and `--attention flash_attention_2` if
flash attention is installed. Sections can be run separately (`--sections`, `--shapes`); their earlier results in the
output file are replaced. The arms take turns step by step in one process, in a new random order each time, so that
other load on the machine affects all of them alike. Peak memory is measured in a separate process for each arm. On a
CPU one thread is used.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

# By default the C library returns large blocks to the system, and each step pays for their pages again: noise.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__" and "PERFORMANCE_STARTED" not in os.environ:
    # The C library reads these variables only when the process starts.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PERFORMANCE_STARTED": "1"})

import peft
import torch
import transformers
from arms import ARMS, SHAPES, base_model, build, config_of
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicCache, StaticCache

# The rows of the KLUE-NLI table (docs/recipes.md): virtual tokens and width of the MLP, `None` for a table. The row of
# 200 tokens without an MLP is added here.
ROWS = [(20, None), (100, None), (200, None), (20, 512), (100, 512), (200, 512), (200, 768)]
CONTEXTS = (64, 1024, 4096)
GROWTH = {
    "n": (1, 32, 128, 512),
    "batch": (1, 4, 16),
    "tokens": (32, 128, 448),
    "prefixed": (1, 2, 4, 6),
    "depth": (1, 2, 4, 6),
}


class Bench:
    """A device, a precision, and the functions that measure time on it."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        # For tokens with a static cache. On a GPU this is the mode that `generate` chooses: CUDA graphs.
        self.compile = {"mode": "reduce-overhead"} if self.cuda else {}
        self.order = random.Random(0)
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"

    def autocast(self):
        """Return the autocast context of a step."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.precision == "bf16" else nullcontext()

    def build(self, arm, config, *args, **kwargs):
        """Build an arm's model on the device, as drawing the weights of a large model on the CPU takes seconds."""
        with self.device:
            return build(arm, config, *args, **kwargs, attention=self.args.attention).to(self.device)

    def run(self, model, **inputs):
        """Run a forward pass without gradients."""
        with torch.inference_mode(), self.autocast():
            model(**inputs)

    def seconds(self, step):
        """Return the seconds of one call of `step`."""
        if self.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def compare(self, steps, rounds=None, warmup=None, **about):
        """Time each arm's step once per round.

        Returns:
            A result for each arm, with the seconds of all rounds. The n-th times of all arms are from the same round.
        """
        times = {arm: [] for arm in steps}
        rounds = rounds or self.args.rounds
        warmup = self.args.warmup if warmup is None else warmup
        for number in range(rounds + warmup):
            for arm in self.order.sample(list(steps), len(steps)):
                seconds = self.seconds(steps[arm])
                if number >= warmup:
                    times[arm].append(round(seconds, 7))
        results = [{**about, "arm": arm, "seconds": found} for arm, found in times.items()]
        medians = {arm: round(1e3 * statistics.median(found), 3) for arm, found in times.items()}
        print(json.dumps({**about, "milliseconds": medians}), flush=True)
        return results


def batch_of(config, device, batch=32, tokens=128):
    """Return random inputs of one length, with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 5000, (batch, tokens), generator=generator).to(device)
    labels = ids if config.model_type == "llama" else torch.arange(batch, device=device) % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def training_step(bench, model, batch):
    """Return a function that runs a training step: forward, loss, backward, AdamW."""
    model.train()
    # A frozen decoder has no task head, and therefore nothing to train.
    trained = [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step():
        with bench.autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows_of(shape):
    """Return the rows of the table for a shape; an encoder uses all rows of the KLUE-NLI table."""
    return ROWS if shape != "llama" else [(20, None), (20, 512)]


def arms_of(bench, shape):
    """Return the requested arms; the reference works for BERT only."""
    return [arm for arm in bench.args.arms if shape != "llama" or arm != "reference"]


def train(bench):
    """Time a training step of every arm, for every row of the table."""
    for shape in bench.args.shapes:
        for n, width in rows_of(shape):
            steps = {arm: step_of(bench, arm, shape, n, width) for arm in arms_of(bench, shape)}
            yield from compare_steps(bench, steps, shape, n, width)


def step_of(bench, arm, shape, n, width):
    """Return the training step of an arm, for a row of the table."""
    config = config_of(shape)
    return training_step(bench, bench.build(arm, config, n, width), batch_of(config, bench.device, bench.args.batch))


def compare_steps(bench, steps, shape, n, width):
    """Return the results of a row of the table."""
    about = {"section": "train", "shape": shape, "n": n, "width": width, "batch": bench.args.batch}
    return bench.compare(steps, **about)


def memory(bench):
    """Measure the peak memory of a training step, each arm in a separate process."""
    ways = (False, True) if len(bench.args.arms) == len(ARMS) else (False,)
    for shape in bench.args.shapes:
        settings = {"section": "memory", "shape": shape, "batch": bench.args.batch}
        same = ("frozen", "full", "lora")
        for arm in (arm for arm in same if arm in ("frozen", *bench.args.arms)):
            for checkpointing in ways:
                yield peak_of(bench, {**settings, "arm": arm, "any_n": True, "checkpointing": checkpointing})
        for n, width in rows_of(shape):
            for arm in (arm for arm in arms_of(bench, shape) if arm not in same):
                spec = {**settings, "arm": arm, "n": n, "width": width}
                for checkpointing in ways if arm == "ours" else (False,):
                    yield peak_of(bench, {**spec, "checkpointing": checkpointing})


def peak_of(bench, spec):
    """Measure the peak memory of a training step; on a CPU, in a separate process."""
    if bench.cuda:  # its allocator counts the memory of this process exactly
        result = {**spec, **measure_peak(bench, spec)}
        print(json.dumps(result), flush=True)
        return result
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", json.dumps(spec)]
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if finished.returncode:
        raise RuntimeError(f"{spec}: {finished.stderr}")
    result = {**spec, **json.loads(finished.stdout.splitlines()[-1])}
    print(json.dumps(result), flush=True)
    return result


def measure_peak(bench, spec):
    """Return the peak memory of the second step above the memory in use before it, and that memory, in bytes."""
    held = held_now(bench)
    config = config_of(spec["shape"])
    config.num_hidden_layers = spec.get("depth") or config.num_hidden_layers
    batch = batch_of(config, bench.device, spec["batch"], spec.get("tokens", 128))
    model = bench.build(spec["arm"], config, spec.get("n", 20), spec.get("width"), spec.get("prefixed"))
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = training_step(bench, model, batch)
    step()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        peak = most_alive(profiled)
    return {"peak": peak, "before": before - held}


def held_now(bench):
    """Return the bytes in use on a GPU before an arm is built."""
    if not bench.cuda:
        return 0
    gc.collect()
    # The first matrix product allocates the workspace of the library.
    torch.ones(8, 8, device=bench.device) @ torch.ones(8, 8, device=bench.device)
    return torch.cuda.memory_allocated()


def allocated():
    """Return the bytes of all tensors."""
    sizes = {}
    for each in gc.get_objects():
        # Fake tensors of the compiler have no memory and raise an error.
        with suppress(RuntimeError):
            if isinstance(each, torch.Tensor):
                sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(sizes.values())


def most_alive(profiled):
    """Return the peak of allocated bytes above the start, from the profiler's record of allocations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    alive = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most


def infer(bench):
    """Time a forward pass of an encoder with a prefix of 20 tokens, and without a prefix."""
    for shape in (shape for shape in bench.args.shapes if shape != "llama"):
        config = config_of(shape)
        batch = batch_of(config, bench.device, bench.args.batch)
        del batch["labels"]
        steps = {}
        for arm in ("frozen", "peft", "reference", "ours", "floor"):
            model = bench.build(arm, config).eval().requires_grad_(False)
            steps[arm] = partial(bench.run, model, **batch)
        yield from bench.compare(steps, section="infer", shape=shape, n=20, batch=bench.args.batch)


def decode(bench):
    """Time single tokens of a decoder after a context. The base model has n more tokens in its cache."""
    yield from tokens_of(bench, config_of("llama"), CONTEXTS, ("dynamic", "static", "compiled"))


def tokens_of(bench, config, contexts, kinds):
    """Time the first token and the following tokens, for each context and kind of cache.

    As in `generate`, positions are passed in, and PEFT's wrapper is called once instead of once per token. `compiled`
    is a static cache with `torch.compile`; the prompt itself runs uncompiled. With bf16 the weights are bf16 too:
    under autocast Llama's values have another dtype than its keys, and no static cache of transformers accepts that.
    """
    n = 20
    dtype = torch.bfloat16 if bench.args.precision == "bf16" else torch.float32

    def frozen(arm):
        return bench.build(arm, config, n).to(dtype).eval().requires_grad_(False)

    models = {"base": frozen("full")}
    wrapped = {arm: frozen(arm) for arm in ("ours", "peft", "lora")}
    models |= {arm: wrapped[arm].base_model.model for arm in ("ours", "lora")}
    models["peft"] = wrapped["peft"].base_model
    # All models share the memory of their weights, because its location changes times by a few hundredths.
    weights = dict(models["base"].named_parameters())
    for model in models.values():
        for name, parameter in model.named_parameters():
            shared = weights.get(name.replace(".base_layer", ""))
            if shared is not None:
                parameter.data = shared.data
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 5000, (1, max(contexts) + n), generator=generator).to(bench.device)
    rounds = 8 * bench.args.rounds

    def prompt(arm, context, kind):
        """Return the cache with the context, and the next position."""
        own = context + n if arm == "base" else context
        if arm == "peft":
            cache = wrapped[arm].get_prompt(batch_size=1)
        elif kind == "dynamic":
            cache = DynamicCache(config=config)
        else:
            cache = StaticCache(config, own + rounds + 2 * bench.args.warmup)
        with torch.inference_mode():
            models[arm](input_ids=tokens[:, :own], past_key_values=cache, logits_to_keep=1)
        return cache, torch.tensor([[own + (n if arm == "peft" else 0)]], device=bench.device)

    def token(model, cache, position):
        with torch.inference_mode():
            model(input_ids=tokens[:, :1], past_key_values=cache, position_ids=position, logits_to_keep=1)
            position += 1

    for context in contexts:
        about = {"shape": "llama", "n": n, "context": context}
        firsts = {arm: partial(prompt, arm, context, "dynamic") for arm in models}
        # A short prompt is fast and the differences are small, so it needs more rounds.
        often = bench.args.rounds * max(1, 1024 // context)
        yield from bench.compare(firsts, often, section="first token", **about)
        for kind in kinds:
            # PEFT's prefix tuning puts the prefix into a dynamic cache; it cannot use a static one.
            arms = [arm for arm in models if kind == "dynamic" or arm != "peft"]
            used = dict(models)
            if kind == "compiled":
                torch._dynamo.reset()
                used = {arm: torch.compile(models[arm], **bench.compile) for arm in arms}
            steps = {arm: partial(token, used[arm], *prompt(arm, context, kind)) for arm in arms}
            yield from bench.compare(steps, rounds, section="decode", cache=kind, **about)


def host(bench):
    """Time steps and tokens of a very narrow decoder, whose time is spent in Python and in launching operations."""
    config = config_of("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 96, 128, 8
    batch = batch_of(config, bench.device, 1, 32)
    arms = ("full", "lora", "peft", "ours", "floor", "frozen")
    steps = {arm: training_step(bench, bench.build(arm, config), batch) for arm in arms}
    yield from bench.compare(steps, 10 * bench.args.rounds, section="host", what="training step", n=20)
    for each in tokens_of(bench, config, (64,), ("dynamic", "static")):
        if each["section"] == "decode":
            yield {**each, "section": "host", "what": f"a token, {each['cache']} cache"}


def load(bench):
    """Time loading an adapter of BERT-base onto a base model in memory, and switching between two loaded adapters."""
    config = config_of("multilingual")
    config.vocab_size = 30522
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for arm in ("ours", "lora"):
            build(arm, config).save_pretrained(f"{folder}/{arm}")
            models[arm] = PeftModel.from_pretrained(base_model(config), f"{folder}/{arm}").to(bench.device)
            models[arm].load_adapter(f"{folder}/{arm}", "other")
        times = {arm: [] for arm in models}
        for number in range(4 * bench.args.rounds + bench.args.warmup):
            for arm, model in models.items():
                step = partial(model.load_adapter, f"{folder}/{arm}", "new", torch_device=str(bench.device))
                seconds = bench.seconds(step)
                model.delete_adapter("new")
                if number >= bench.args.warmup:
                    times[arm].append(seconds)
        yield from ({"section": "load", "n": 20, "arm": arm, "seconds": found} for arm, found in times.items())
        print(json.dumps({arm: 1e3 * statistics.median(found) for arm, found in times.items()}), flush=True)

        def switching(model):
            names = iter(["other", "default"] * 10**5)
            return lambda: model.set_adapter(next(names))

        steps = {arm: switching(model) for arm, model in models.items()}
        yield from bench.compare(steps, 10 * bench.args.rounds, section="switch", n=20)


def growth(bench):
    """Measure time and memory of a training step while one size grows."""
    for name, values in GROWTH.items():
        for value in values:
            config = config_of("minilm")
            # `prefixed` counts layers from the last: with fewer of them the backward pass visits fewer layers.
            settings = {"n": 20, "batch": 8, "tokens": 128, "prefixed": None, "depth": config.num_hidden_layers}
            settings[name] = value
            config.num_hidden_layers = settings["depth"]
            batch = batch_of(config, bench.device, settings["batch"], settings["tokens"])
            arms = ("ours",) if name == "prefixed" else ("ours", "floor", "frozen")
            about = {"shape": "minilm", "grows": name, **settings}
            steps = {
                arm: training_step(bench, bench.build(arm, config, settings["n"], None, settings["prefixed"]), batch)
                for arm in arms
            }
            yield from bench.compare(steps, section="growth", **about)
            yield from (peak_of(bench, {**about, "section": "growth of memory", "arm": arm}) for arm in arms)


# Operations that do not touch data.
_VIEWS = (
    "view",
    "reshape",
    "transpose",
    "permute",
    "t",
    "expand",
    "slice",
    "select",
    "narrow",
    "unsqueeze",
    "squeeze",
)
_VIEWS += ("detach", "alias", "as_strided", "split", "unflatten", "unbind", "to", "result_type", "flatten")


def operations(bench):
    """Count the tensor operations of a training step and of a decoded token; on a GPU these are launches."""
    results = []

    def count(about, step):
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        events = [e for e in profiled.events() if e.name.startswith("aten::")]
        # Only the innermost operations do work.
        found = [e for e in events if not any(child.name.startswith("aten::") for child in e.cpu_children)]
        names = [e.name.removeprefix("aten::").rstrip("_") for e in found]
        number = sum(name not in _VIEWS and not name.startswith("empty") for name in names)
        results.append({"section": "operations", **about, "operations": number})
        print(json.dumps(results[-1]), flush=True)

    def training(model, batch):
        model(**batch).loss.backward()

    config = config_of("minilm")
    batch = batch_of(config, bench.device, 2, 16)
    for width in (None, 512):
        for arm in ("frozen", "floor", "ours", "peft", "reference"):
            if width is None or arm not in ("frozen", "floor"):
                model = bench.build(arm, config, 20, width).train()
                count({"what": "training step", "arm": arm, "n": 20, "width": width}, partial(training, model, batch))
    config = config_of("llama")
    for arm in ("base", "ours"):
        model = (base_model(config) if arm == "base" else bench.build("ours", config).base_model.model).to(
            bench.device
        )
        model.eval().requires_grad_(False)
        for kind, context in (("dynamic", 64), ("dynamic", 1024), ("static", 64)):
            cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 128)
            ids = torch.randint(1000, 5000, (1, context), device=bench.device)
            positions = torch.tensor([[context]], device=bench.device)
            bench.run(model, input_ids=ids, past_key_values=cache)
            token = partial(bench.run, model, input_ids=ids[:, :1], past_key_values=cache, position_ids=positions)
            count({"what": f"a token behind {context}, {kind} cache", "arm": arm, "n": 20, "width": None}, token)
    return results


SECTIONS = {
    "train": train,
    "memory": memory,
    "infer": infer,
    "decode": decode,
    "host": host,
    "load": load,
    "growth": growth,
    "operations": operations,
}


def git_commit():
    """Return the commit, with `-dirty` if files have changed, or `unknown` in a copy without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def processor():
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(path, known, found):
    """Write all results to `path`, after replacing known results of the same setting by new ones; return them."""

    def about(each):
        return [each.get(key) for key in ("section", "shape", "batch", "machine", "precision")]

    replaced = [about(each) for each in found]
    results = [each for each in known if about(each) not in replaced] + found
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results), encoding="utf-8")
    unfinished.replace(path)
    return results


def made_by(bench):
    """Return the machine, precision, versions and commit, which are added to every result."""
    args = bench.args
    return {
        "machine": torch.cuda.get_device_name() if bench.cuda else f"{processor()}, one thread",
        "precision": args.precision + ("" if args.attention == "sdpa" else f", {args.attention}"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "commit": git_commit(),
    }


def options():
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file with all figures; new figures are added")
    parser.add_argument("--report", type=Path, help="write the tables to this page instead of measuring")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        help="arms of training steps; a selection skips the measurements with gradient checkpointing",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of all arms except the floor")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main():
    """Run the command."""
    args = options().parse_args()
    if args.memory_of:
        print(json.dumps(measure_peak(Bench(args), json.loads(args.memory_of))))
        return
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    if args.report:
        from report import page, plot

        notes = Path(__file__).with_name("performance_notes.md").read_text(encoding="utf-8")
        args.report.write_text(page(known, notes), encoding="utf-8")
        plot(known, args.report.with_name("performance-growth.png"))
        return
    bench = Bench(args)
    made = made_by(bench)
    for name in args.sections:
        started, found = time.perf_counter(), []
        for each in SECTIONS[name](bench):
            found.append({**each, **made})
            save(args.output, known, found)
        known = save(args.output, known, found)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
