"""How fast, and in how much memory: P-Tuning v2 beside other methods, and beside the least that it could cost.

    python benchmarks/performance.py --output runs/performance.json
    python benchmarks/performance.py --output runs/performance.json --report docs/performance.md

On a GPU `bash benchmarks/gpu.sh` measures what matters there, with these functions. Here a GPU is `--device cuda`, and
`--precision tf32` or `bf16`, and where flash attention is installed `--attention flash_attention_2`. Each section can
be run by itself (`--sections`, `--shapes`); what is in the output already is replaced. Arms take turns step by step in
one process, in an order drawn anew each time, so that whatever else the machine does meets all of them; peak memory is
measured in a process for each arm. On a CPU one thread is used.
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

# The C library gives large blocks back to the system and pays for each of their pages again: noise in every step.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**33))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__" and "PERFORMANCE_STARTED" not in os.environ:
    # The C library reads them once, at the start.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PERFORMANCE_STARTED": "1"})

import peft
import torch
import transformers
from arms import ARMS, SHAPES, base_model, build, config_of
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicCache, StaticCache

# The rows of the seed's table: virtual tokens and the MLP's width, None for a table. 200 without an MLP is ours.
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
    """A device, a precision, and how to time on it."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        # For tokens behind a static cache: on a GPU what `generate` chooses, which is CUDA graphs.
        self.compile = {"mode": "reduce-overhead"} if self.cuda else {}
        self.order = random.Random(0)
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"

    def autocast(self):
        """What a step runs under."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.precision == "bf16" else nullcontext()

    def build(self, arm, config, *args, **kwargs):
        """An arm's model, made on the device: to draw the weights of a large one on the CPU takes seconds."""
        with self.device:
            return build(arm, config, *args, **kwargs, attention=self.args.attention).to(self.device)

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

    def compare(self, steps, rounds=None, warmup=None, **about):
        """Each step in turn, round by round: the seconds of each, the n-th of all arms in the same round."""
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
    """Random input, all of one length, with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 5000, (batch, tokens), generator=generator).to(device)
    labels = ids if config.model_type == "llama" else torch.arange(batch, device=device) % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def training_step(bench, model, batch):
    """A step of training: forward, loss, backward, AdamW."""
    model.train()
    # A frozen decoder has no head of the task's, and so nothing to train.
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
    """The rows of the table for a shape: all of the seed's for an encoder."""
    return ROWS if shape != "llama" else [(20, None), (20, 512)]


def arms_of(bench, shape):
    """Those asked for; the reference is written for BERTs."""
    return [arm for arm in bench.args.arms if shape != "llama" or arm != "reference"]


def train(bench):
    """A training step of every arm, for every row of the seed's table."""
    for shape in bench.args.shapes:
        for n, width in rows_of(shape):
            steps = {arm: step_of(bench, arm, shape, n, width) for arm in arms_of(bench, shape)}
            yield from compare_steps(bench, steps, shape, n, width)


def step_of(bench, arm, shape, n, width):
    """The training step of an arm, for a row of the table."""
    config = config_of(shape)
    return training_step(bench, bench.build(arm, config, n, width), batch_of(config, bench.device, bench.args.batch))


def compare_steps(bench, steps, shape, n, width):
    """The results of a row of the table."""
    about = {"section": "train", "shape": shape, "n": n, "width": width, "batch": bench.args.batch}
    return bench.compare(steps, **about)


def memory(bench):
    """Peak memory of a training step, each arm in a process of its own."""
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
    """The peak of a training step, on a CPU measured in a process of its own."""
    if bench.cuda:  # whose allocator counts exactly what this process holds
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
    """The peak of tensors in the second step, above what is there before it, and that, in bytes."""
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
    """The bytes of what was on a GPU before an arm is built there."""
    if not bench.cuda:
        return 0
    gc.collect()
    # The first product allocates the library's own workspace.
    torch.ones(8, 8, device=bench.device) @ torch.ones(8, 8, device=bench.device)
    return torch.cuda.memory_allocated()


def allocated():
    """The bytes of all tensors."""
    sizes = {}
    for each in gc.get_objects():
        # What a compiler traced with has no memory, and says so by an error.
        with suppress(RuntimeError):
            if isinstance(each, torch.Tensor):
                sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(sizes.values())


def most_alive(profiled):
    """The most bytes of tensors that were alive at a time, above the start, as the profiler saw them come and go."""
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
    """A forward of an encoder with a prefix of 20, and without one."""
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
    """Tokens of a decoder one by one behind a context; the base model has the n tokens more in its cache."""
    yield from tokens_of(bench, config_of("llama"), CONTEXTS, ("dynamic", "static", "compiled"))


def tokens_of(bench, config, contexts, kinds):
    """The first token and those that follow, for each context and kind of cache.

    As in `generate`: positions are handed over, and PEFT's wrapper hands over to the model inside once and not for
    each token. `compiled` is a static cache behind `torch.compile`, for which the prompt is run as it is. In bf16 the
    weights are, and not just the arithmetic: under autocast Llama's values have another dtype than its keys, which no
    static cache of transformers takes.
    """
    n = 20
    dtype = torch.bfloat16 if bench.args.precision == "bf16" else torch.float32

    def frozen(arm):
        return bench.build(arm, config, n).to(dtype).eval().requires_grad_(False)

    models = {"base": frozen("full")}
    wrapped = {arm: frozen(arm) for arm in ("ours", "peft", "lora")}
    models |= {arm: wrapped[arm].base_model.model for arm in ("ours", "lora")}
    models["peft"] = wrapped["peft"].base_model
    # One memory for the weights of all: where they lie is worth a few hundredths.
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
        """The cache behind the context, and the position that follows."""
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
        # A short prompt is quick, and differs by little.
        often = bench.args.rounds * max(1, 1024 // context)
        yield from bench.compare(firsts, often, section="first token", **about)
        for kind in kinds:
            # What PEFT's prefix tuning is given as a cache holds the prefix, and is no static one.
            arms = [arm for arm in models if kind == "dynamic" or arm != "peft"]
            used = dict(models)
            if kind == "compiled":
                torch._dynamo.reset()
                used = {arm: torch.compile(models[arm], **bench.compile) for arm in arms}
            steps = {arm: partial(token, used[arm], *prompt(arm, context, kind)) for arm in arms}
            yield from bench.compare(steps, rounds, section="decode", cache=kind, **about)


def host(bench):
    """Steps and tokens of a decoder so narrow that what takes time is Python and the start of operations."""
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
    """Loading an adapter of bert-base onto a base model in memory, and switching between two that are loaded."""
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
    """Time and memory of a training step as one thing grows."""
    for name, values in GROWTH.items():
        for value in values:
            config = config_of("minilm")
            # One layer after another is given a prefix from the last, so that fewer of them are gone back through.
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


# Operations that move no data.
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
    """How many operations on data a training step, and a token in decoding, are made of: launches, on a GPU."""
    results = []

    def count(about, step):
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        events = [e for e in profiled.events() if e.name.startswith("aten::")]
        # Only those at the end of a chain of calls do something.
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
    """The commit, and whether there is more; `unknown` in a copy without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def processor():
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(path, known, found):
    """Write all results to `path`, with those of the same kind replaced by what was found; return them."""

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
    """What every result says of how it was made."""
    args = bench.args
    return {
        "machine": torch.cuda.get_device_name() if bench.cuda else f"{processor()}, one thread",
        "precision": args.precision + ("" if args.attention == "sdpa" else f", {args.attention}"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "commit": git_commit(),
    }


def options():
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON with all figures; added to")
    parser.add_argument("--report", type=Path, help="write the tables to this page, and measure nothing")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        help="of training steps; if picked, without checkpointing",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation, of all but the floor")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main():
    """The command."""
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
