"""Checks of features that only a GPU has: sdpa's kernels, offloaded caches, CUDA graphs, recomputed dropout.

The reference ("truth") is the plain backbone in float64 with eager attention, with the prefix in a cache of
transformers. The allowed error is a few times that of the plain backbone in the same precision.
"""

import copy
import importlib.util
import itertools
import os
import shutil
import time
from contextlib import nullcontext
from functools import cache, partial

import tiny
import torch
import torch.nn.functional as F
import transformers as tr
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from gpu import Skip
from gpu.common import HALF, arithmetic, autocast, device_of
from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.backbone.causal import CausalMask

N, NEW = 5, 16
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
# Flash attention supports heads of 64.
KINDS = {
    "grouped": ("llama", {**SIZES, "head_dim": 64, "num_key_value_heads": 2}),
    "ungrouped": ("llama", {**SIZES, "head_dim": 64, "num_key_value_heads": 4}),
    "encoder": ("bert", SIZES),
}
# The allowed error is the larger of these two: a multiple of the plain backbone's error, or a constant.
TIMES, FLOOR = 4, {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.5e-2}


class Subject:
    """A model with prefixes, the same backbone without a prefix, and the reference in float64.

    Attributes:
        ours: The model with the adapters `names`; the first one is active.
        plain: The backbone with the same weights in the same precision.
        truth: The backbone with the same weights in float64, with eager attention.
    """

    def __init__(self, args, precision, kind="grouped", attention="sdpa", names=("a",), layers=3):
        self.precision, self.device, self.encoder = precision, device_of(args), kind == "encoder"
        self.layers = layers
        self.plain = self.backbone(kind, attention).to(HALF.get(precision, torch.float32))
        self.truth = self.backbone(kind, "eager")
        self.truth.load_state_dict(self.plain.state_dict())
        self.truth.double()
        task = "TOKEN_CLS" if self.encoder else "CAUSAL_LM"
        configs = {
            name: PrefixTuningV2Config(task_type=task, num_virtual_tokens=N + 2 * number, prefix_dropout=0.0)
            for number, name in enumerate(names)
        }
        self.ours = get_peft_model(copy.deepcopy(self.plain), configs[names[0]], adapter_name=names[0]).eval()
        for name in names[1:]:
            self.ours.add_adapter(name, configs[name])
        for number, name in enumerate(names):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                # Of an encoder's long input, a few tokens of the size of the others would change little.
                scale = 2.0 if self.encoder else 1.0
                self.table(name).copy_(scale * torch.randn(self.table(name).shape, generator=generator))
        self.encoder or self.never_stop(self.ours.base_model.model, self.plain)

    def backbone(self, kind, attention):
        """Build the backbone; every call gives the same weights."""
        model_type, sizes = KINDS[kind]
        auto_class = "AutoModelForTokenClassification" if self.encoder else "AutoModelForCausalLM"
        # In layers this wide, weights as large as the tests' would amplify rounding errors.
        sizes = {"initializer_range": 0.06, "max_position_embeddings": 2048, **sizes}
        sizes["num_hidden_layers"] = self.layers
        with torch.device(self.device):
            return tiny.model(model_type, auto_class, attn=attention, **sizes).requires_grad_(False)

    @staticmethod
    def never_stop(*models):
        """Disable the end-of-sequence token, so that generation does not stop early."""
        for model in models:
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def table(self, name):
        """Return an adapter's table `[n, layers * 2 * heads * size]`."""
        return self.ours.base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding[name].weight

    def behind(self, model, table, ids, mask=None):
        """Return the logits of a backbone whose cache begins with the keys and values of a table.

        Args:
            model: `plain` or `truth`.
            table: The table; `None` for no prefix.
            ids: Token ids `[batch, tokens]`.
            mask: Attention mask `[batch, tokens]`; `None` if there is no padding.
        """
        config = model.config
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        if table is not None:
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            sides = table.to(model.dtype).unflatten(1, (2 * config.num_hidden_layers, heads, -1))
            # [layers * 2, batch, heads, n, size]
            sides = sides.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, len(ids), -1, -1, -1)
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
                cache.update(keys, values, layer)
            mask = torch.cat([mask.new_ones(len(ids), len(table)), mask], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        if not self.encoder:
            return model(**inputs).logits
        return model.classifier(model.bert(**inputs)[0])

    def alone(self, model, table, ids, mask):
        """Return the same for each row alone, without its padding: logits `[real tokens, vocabulary]`."""
        rows = (own[real.bool()][None] for own, real in zip(ids, mask, strict=True))
        return torch.cat([self.behind(model, table, own)[0] for own in rows])

    def judge(self, figures, ours, same, truth, without=None):
        """Compare this package and the plain backbone with the reference, and record both errors.

        Args:
            figures: The dictionary for the errors.
            ours: The result of this package.
            same: The result of the plain backbone in the same precision.
            truth: The reference.
            without: The reference without a prefix. It must differ by more than the allowed error.
        """
        error, own = _error(ours, truth), _error(same, truth)
        figures |= {"error": max(error, figures.get("error", 0.0)), "backbone": max(own, figures.get("backbone", 0.0))}
        allowed = max(TIMES * own, FLOOR[self.precision])
        # `<=` also fails for NaN.
        assert error <= allowed, f"an error of {error:.3g}; the backbone's own error is {own:.3g}"
        if without is not None:
            effect = _error(without, truth)
            assert effect > 3 * allowed, f"a missing prefix causes an error of {effect:.3g}, too small to be detected"


def _error(actual, expected):
    """Return the largest difference, relative to the largest expected element."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs().max() / expected.abs().max()).item()


def check(args, precision, function, *arguments, limit=None):
    """Return a check that runs a function in a precision, within `limit` seconds."""

    def call(figures):
        with arithmetic(precision):
            function(figures, args, precision, *arguments)

    if limit:
        call.limit = limit
    return call


def compiled(args, precision):
    """Check compiled generation and training; compilation takes long."""
    yield "generation", check(args, precision, compiled_generation, limit=150)
    if not args.tiny or precision == "fp32":
        yield "training step", check(args, precision, compiled_training, limit=120)


def on_device(args, precision):
    """Check kernels, caches and random numbers of the device."""
    half, checks = precision in HALF, []
    # Shared by all checks that do not change it, and built when the first of them runs.
    subject = cache(partial(Subject, args, precision))

    def add(name, function, *arguments):
        checks.append((name, check(args, precision, function, *arguments)))

    for kind in ("grouped", "encoder") if args.tiny else KINDS:
        for backend in ("any", *BACKENDS):
            add(f"sdpa {backend}, {kind}", sdpa_backend, subject, kind, backend)
    add("CausalMask", causal_mask)
    for name, options in CACHES.items():
        add(f"generate, {name}", generation, subject, options)
    add("generate, two turns with one cache", two_turns, subject)
    if precision == "fp32":
        add("generate, beams", beams, subject)
    if half:
        for kind in KINDS:
            add(f"flash_attention_2, {kind}", flash_attention_2, kind)
    for kind in ("grouped", "encoder"):
        add(f"mixed batch, {kind}", mixed_batch, kind)
    for kind in ("grouped", "encoder"):
        for reentrant in (False, True):
            add(f"checkpointing, {kind}, {'' if reentrant else 'not '}reentrant", checkpointing, kind, reentrant)
    if args.tiny and precision != "fp32":
        checks = [each for each in checks if each[0] in TINY]
    return checks


# Checks that `--tiny` also runs in precisions other than fp32.
TINY = (
    "sdpa any, grouped",
    "CausalMask",
    "flash_attention_2, grouped",
    "checkpointing, grouped, not reentrant",
)


# ---- sdpa's kernels

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Kernels(TorchDispatchMode):
    """Record which of sdpa's kernels are called. `math` calls none, as it uses plain matrix products."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            self.seen.add(name.removeprefix("_scaled_dot_product_"))
        return function(*args, **(kwargs or {}))


def _no_kernel(error):
    """Return whether the error says that no allowed kernel supports these inputs."""
    return any(text in str(error) for text in ("No available kernel", "No viable backend"))


def sdpa_backend(figures, args, precision, subject, kind, backend):
    """Check logits and gradients of the prefix for long, short and padded inputs, with one of sdpa's kernels."""
    subject = subject(kind)
    only = nullcontext if backend == "any" else (lambda: sdpa_kernel(BACKENDS[backend]))
    long = 96 if args.tiny else 384
    refused = []
    for name, tokens in (("long", long), ("short", 24), ("padded", 24)):
        ids = tiny.ids(2, tokens).to(subject.device)
        mask = torch.ones_like(ids)
        if name == "padded":
            mask[1, : 8 if not subject.encoder else 0], mask[1, tokens - (8 if subject.encoder else 0) :] = 0, 0
        real = mask.bool()
        found = figures[name] = {}
        direction = torch.randn(2, tokens, 1, generator=torch.Generator().manual_seed(3)).to(subject.device)

        def with_gradient(forward, leaf, direction=direction[real]):
            """Return the logits of the real tokens, and the gradient of the table."""
            leaf.requires_grad_(True).grad = None
            logits = forward(leaf)
            (logits.double() * direction).square().mean().backward()
            return logits, leaf.grad

        def ours(table, ids=ids, mask=mask, real=real, name=name):
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            return subject.ours(input_ids=ids, **({} if name == "long" else inputs)).logits[real]

        table = subject.table("a")
        copy_of = table.detach().clone
        truth = with_gradient(partial(subject.alone, subject.truth, ids=ids, mask=mask), copy_of().double())
        same = with_gradient(partial(subject.alone, subject.plain, ids=ids, mask=mask), copy_of())
        without = subject.alone(subject.truth, None, ids, mask)
        try:
            with only(), torch.no_grad():
                subject.behind(subject.plain, None, ids, None if name == "long" else mask)
        except RuntimeError as error:
            refused.append(name)
            found["backbone"] = "no kernel" if _no_kernel(error) else str(error).partition("\n")[0]
            continue
        try:
            with only(), Kernels() as kernels:
                logits, gradient = with_gradient(ours, table)
        except RuntimeError as error:
            # With a prefix, short or padded inputs need an explicit mask, which flash attention does not support.
            if not _no_kernel(error) or (name == "long" and backend == "flash"):
                raise
            found["ours"] = "no kernel"
            continue
        found["kernels"] = sorted(kernels.seen)
        subject.judge(found, logits, same[0], truth[0], without)
        found["gradient"] = {}
        subject.judge(found["gradient"], gradient, same[1], truth[1])
        if backend == "any" and name == "long" and precision in HALF and subject.device.type == "cuda":
            assert kernels.seen, "a long input without padding uses none of the fused kernels"
    if len(refused) == 3:
        raise Skip(f"the plain backbone has no {backend} kernel for these inputs here")


def causal_mask(figures, args, precision):
    """Compare `CausalMask` with an explicit mask in float64, for each kernel."""
    device, dtype = device_of(args), HALF.get(precision, torch.float32)
    for backend, groups, tokens in itertools.product(("any", *BACKENDS), (1, 2), (24, 200)):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 4, tokens, 64), (2, 4 // groups, N + tokens, 64), (2, 4 // groups, N + tokens, 64)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        visible = torch.ones(tokens, N + tokens, dtype=torch.bool, device=device).tril(N)[None, None]

        def attend(mask, inputs, grouped=groups > 1):
            inputs = [each.clone().requires_grad_(True) for each in inputs]
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=grouped)
            output.double().square().sum().backward()
            return [output, *(each.grad for each in inputs)]

        with sdpa_kernel(SDPBackend.MATH):
            truth, same = attend(visible, [each.double() for each in inputs]), attend(visible, inputs)
        name = f"{backend}, {tokens} tokens, {groups} in a group"
        try:
            with nullcontext() if backend == "any" else sdpa_kernel(BACKENDS[backend]):
                ours = attend(CausalMask(tokens, N, device), inputs)
        except RuntimeError as error:
            if not _no_kernel(error) or backend in ("any", "math"):
                raise
            figures[name] = "no kernel"
            continue
        errors = [
            (_error(one, right), _error(other, right)) for one, other, right in zip(ours, same, truth, strict=True)
        ]
        figures[name] = max(error for error, _ in errors)
        for error, own in errors:
            assert error <= max(TIMES * own, FLOOR[precision]), f"{name}: {error:.3g}, with a plain mask {own:.3g}"


def flash_attention_2(figures, args, precision, kind):
    """Check the package flash-attn, if it is installed."""
    if importlib.util.find_spec("flash_attn") is None or args.tiny:
        raise Skip("needs flash-attn")
    subject = Subject(args, precision, kind, "flash_attention_2", names=("a", "b"))
    ids = tiny.ids(2, 96).to(subject.device)
    mask = torch.ones_like(ids)
    mask[(1, slice(-8, None)) if subject.encoder else (1, slice(8))] = 0
    _rows(figures, subject, ids, mask, ["a", "a"])
    _rows(figures, subject, ids, mask, ["b", "__base__"], adapter_names=["b", "__base__"])
    if not subject.encoder:
        generation(figures, args, precision, lambda: subject, {})


# ---- Mixed batches


def _rows(figures, subject, ids, mask, names, **inputs):
    """Compare the logits of each row of a batch with the reference for its own adapter."""
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ours = subject.ours(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs).logits
        for row, name in enumerate(names):
            own, real = slice(row, row + 1), mask[row].bool()
            table = None if name == "__base__" else subject.table(name)
            same, truth = (subject.alone(m, table, ids[own], mask[own]) for m in (subject.plain, subject.truth))
            without = None if table is None else subject.alone(subject.truth, None, ids[own], mask[own])
            subject.judge(figures, ours[row, real], same, truth, without)


def mixed_batch(figures, args, precision, kind):
    """Check batches whose rows use different adapters, in a forward pass and in generate with two kinds of cache."""
    subject = Subject(args, precision, kind, names=("a", "b"))
    names = ["b", "__base__", "a", "b"]
    ids = tiny.ids(4, 24).to(subject.device)
    mask = torch.ones_like(ids)
    mask[(2, slice(-8, None)) if subject.encoder else (2, slice(8))] = 0
    _rows(figures, subject, ids, mask, names, adapter_names=names)
    if not subject.encoder:
        for options in (CACHES["dynamic cache"], CACHES["static cache"]):
            generation(figures, args, precision, lambda: subject, options, names)


# ---- Caches in generate

CACHES = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt in pieces": {"prefill_chunk_size": 5},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "quantized cache": {"cache_implementation": "quantized"},
}


def prompts(subject, rows=2):
    """Return prompts and their mask; the first prompt is padded on the left."""
    ids = tiny.ids(rows, 12, seed=7).to(subject.device)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 0
    return ids, mask


def generate(subject, ids, mask, model=None, **options):
    """Generate greedily; the output includes the logits of each token."""
    model = subject.ours if model is None else model
    asked = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **asked, **options)


def judge_generation(figures, subject, output, ids, mask, names=None):
    """Compare each token's logits with the reference for the tokens before it, so that ties do not matter."""
    logits = torch.stack(output.logits, dim=1)
    assert logits.shape[1] == NEW
    start, tokens = ids.shape[1], output.sequences
    assert torch.equal(tokens[:, :start], ids) and torch.equal(tokens[:, start:], logits.argmax(-1))
    figures["distinct tokens"] = tokens[:, start:].unique().numel()
    tokens = tokens[:, :-1]
    mask = torch.cat([mask, mask.new_ones(len(ids), NEW - 1)], dim=1)
    with torch.no_grad():
        for row, name in enumerate(names or ["a"] * len(ids)):
            own = slice(row, row + 1)
            table = None if name == "__base__" else subject.table(name)
            same, truth, without = (
                subject.alone(model, prefix, tokens[own], mask[own])[-NEW:]
                for model, prefix in ((subject.plain, table), (subject.truth, table), (subject.truth, None))
            )
            subject.judge(figures, logits[row], same, truth, None if table is None else without)


def generation(figures, args, precision, subject, options, names=None):
    """Check generation with a kind of cache."""
    kind, subject = options.get("cache_implementation", ""), subject()
    if kind.startswith("offloaded") and args.tiny:
        raise Skip("needs a GPU")
    if kind == "quantized":
        return quantized(figures, subject)
    ids, mask = prompts(subject, len(names or "ab"))
    if kind.startswith("offloaded"):
        plain = generate(subject, ids, mask, subject.plain, **options)
        try:
            judge_generation({}, subject, plain, ids, mask, ["__base__"] * len(ids))
        except AssertionError as error:
            raise Skip(f"transformers' own cache is wrong here, without a prefix: {error}") from error
    rows = {} if names is None else {"adapter_names": names}
    judge_generation(figures, subject, generate(subject, ids, mask, **options, **rows), ids, mask, names)


def quantized(figures, subject):
    """Check a cache quantised to 8 bits: its logits must be much closer to the reference than without a prefix."""
    backend = next((each for each in ("quanto", "hqq") if _has_quantizer(each)), None)
    if backend is None:
        raise Skip("needs optimum-quanto or hqq")
    ids, mask = prompts(subject)
    settings = {"backend": backend, "nbits": 8, "residual_length": 4}
    output = generate(subject, ids, mask, cache_implementation="quantized", cache_config=settings)
    logits, tokens = torch.stack(output.logits, dim=1), output.sequences[:, :-1]
    mask = torch.cat([mask, mask.new_ones(len(ids), NEW - 1)], dim=1)
    with torch.no_grad():
        rows = [slice(row, row + 1) for row in range(len(ids))]
        truth, without = (
            torch.stack([subject.alone(subject.truth, table, tokens[own], mask[own])[-NEW:] for own in rows])
            for table in (subject.table("a"), None)
        )
    figures["error"], effect = _error(logits, truth), _error(without, truth)
    assert figures["error"] < 0.2 * effect, f"an error of {figures['error']:.3g}; without a prefix it is {effect:.3g}"


def _has_quantizer(name):
    """Return whether this quantisation library is installed."""
    return importlib.util.find_spec({"quanto": "optimum.quanto", "hqq": "hqq"}[name].partition(".")[0]) is not None


def two_turns(figures, args, precision, subject):
    """Check a user's own cache that a forward pass fills and generate continues."""
    subject = subject()
    ids, mask = prompts(subject)
    mask[:] = 1
    cache = DynamicCache(config=subject.ours.config)
    with torch.no_grad():
        subject.ours(input_ids=ids[:, :7], past_key_values=cache)
    judge_generation(figures, subject, generate(subject, ids, mask, past_key_values=cache), ids, mask)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1


def beams(figures, args, precision, subject):
    """Check that beam search, which reorders the cache, finds the same sequences with and without a cache."""
    subject = subject()
    ids, mask = prompts(subject)
    caches = {"no cache": {"use_cache": False}, "dynamic": {}, "static": CACHES["static cache"]}
    found = {}
    for name, options in caches.items():
        output = generate(subject, ids, mask, num_beams=3, output_scores=True, **options)
        found[name] = output.sequences, output.sequences_scores
    for name in ("dynamic", "static"):
        assert torch.equal(found[name][0], found["no cache"][0]), f"{name}: not the sequences without a cache"
        figures[name] = _error(found[name][1], found["no cache"][1])
        assert figures[name] < 1e-4
    plain = generate(subject, ids, mask, subject.plain, num_beams=3).sequences
    assert not torch.equal(plain, found["no cache"][0]), "the result without a prefix is the same"


# ---- Compiled


def needs_compiler(args):
    """Skip if there is no C compiler, which Triton and torch's compiler need."""
    if not args.tiny and not any(shutil.which(each) for each in (os.environ.get("CC", "cc"), "gcc", "clang")):
        raise Skip("needs a C compiler")


def compiled_generation(figures, args, precision):
    """Check static caches in generate, which transformers compiles into CUDA graphs.

    The results must be right, and there must be no more graphs and skipped CUDA graphs than for the plain model.
    """
    needs_compiler(args)
    subject = Subject(args, precision, names=("a", "b"), layers=1 if args.tiny else 3)
    options = {"cache_implementation": "static"}
    if args.tiny:  # on a CPU transformers compiles only with this private setting
        config = tr.CompileConfig(backend="eager", mode=None)
        config._compile_all_devices = True
        options["compile_config"] = config
    counters = torch._dynamo.utils.counters
    ids, mask = prompts(subject)
    found = {}
    for name, model in (("plain", subject.plain), ("ours", subject.ours)):
        torch._dynamo.reset()
        counters.clear()
        started = time.perf_counter()
        generate(subject, ids, mask, model, **options)
        compiled = time.perf_counter() - started
        first = counters["stats"]["unique_graphs"]
        again, launches = _launches(subject, lambda model=model: generate(subject, ids, mask, model, **options))
        found[name] = {
            "graphs": first,
            "graphs of a second call": counters["stats"]["unique_graphs"] - first,
            "skipped CUDA graphs": counters["inductor"]["cudagraph_skips"],
            "graph launches": launches,
            "seconds of the first call": round(compiled, 2),
            "breaks": dict(counters["graph_break"]),
        }
        figures[name] = found[name]
        if name == "ours":
            judge_generation(figures, subject, again, ids, mask)
    # Switch to another adapter, to none, and back to the first, without a reset of the compiler.
    subject.ours.set_adapter("b")
    judge_generation(figures, subject, generate(subject, ids, mask, **options), ids, mask, ["b", "b"])
    if not args.tiny:  # each of these compiles again
        with subject.ours.disable_adapter():
            judge_generation(figures, subject, generate(subject, ids, mask, **options), ids, mask, ["__base__"] * 2)
        subject.ours.set_adapter("a")
        judge_generation(figures, subject, generate(subject, ids, mask, **options), ids, mask)
        with torch.no_grad():
            subject.table("a").mul_(-1.0)
        judge_generation(figures, subject, generate(subject, ids, mask, **options), ids, mask)
    torch._dynamo.reset()
    ours, plain = found["ours"], found["plain"]
    assert ours["graphs"], "nothing was compiled"
    for name in ("graphs", "graphs of a second call", "skipped CUDA graphs"):
        assert ours[name] <= plain[name], f"{name}: {ours[name]}; without a prefix {plain[name]}"
    assert ours["breaks"] == plain["breaks"]
    assert ours["graph launches"] >= plain["graph launches"], "fewer CUDA graphs were launched than without a prefix"


def _launches(subject, call):
    """Return the result of a call, and the number of CUDA graphs that it launches."""
    if subject.device.type != "cuda":
        return call(), 0
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        result = call()
        torch.cuda.synchronize()
    return result, sum(each.name in ("cudaGraphLaunch", "cuGraphLaunch") for each in seen.events())


def compiled_training(figures, args, precision):
    """Compare forward and backward of a compiled model with those of the uncompiled model."""
    needs_compiler(args)
    for kind in ("encoder",) if args.tiny else ("encoder", "grouped"):
        subject = Subject(args, precision, kind, layers=1 if args.tiny else 3)
        ids = tiny.ids(2, 24).to(subject.device)
        table, results = subject.table("a"), {}
        torch._dynamo.reset()
        forwards = {
            "ours": torch.compile(subject.ours, **({"backend": "eager"} if args.tiny else {})),
            "same": subject.ours,
        }
        for name, forward in forwards.items():
            table.grad = None
            logits = forward(input_ids=ids).logits
            logits.double().square().mean().backward()
            results[name] = logits, table.grad
        leaf = table.detach().double().requires_grad_(True)
        logits = subject.behind(subject.truth, leaf, ids)
        logits.square().mean().backward()
        own = figures[kind] = {"gradient": {}}
        subject.judge(own, results["ours"][0], results["same"][0], logits)
        subject.judge(own["gradient"], results["ours"][1], results["same"][1], leaf.grad)
    torch._dynamo.reset()


# ---- Training


def checkpointing(figures, args, precision, kind, reentrant):
    """Check that gradient checkpointing gives the same gradients: the same dropout is drawn, in the same precision."""
    device = device_of(args)
    model_type, sizes = KINDS[kind]
    dropout = {"attention_dropout": 0.1} if model_type == "llama" else {}
    auto_class = "AutoModelForTokenClassification" if kind == "encoder" else "AutoModelForCausalLM"
    ids = tiny.ids(2, 24).to(device)
    results = []
    for checkpointed, seed in ((False, 1), (True, 1), (False, 2)):
        with torch.device(device):
            base = tiny.model(model_type, auto_class, initializer_range=0.06, **sizes, **dropout)
        task = "TOKEN_CLS" if kind == "encoder" else "CAUSAL_LM"
        settings = {"prefix_projection": True, "encoder_hidden_size": 16, "prefix_dropout": 0.2}
        torch.manual_seed(0)
        model = get_peft_model(base, PrefixTuningV2Config(task_type=task, num_virtual_tokens=N, **settings))
        recomputed = []
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.register_forward_hook(lambda *_, recomputed=recomputed: recomputed.append(None))
        model.train()
        torch.manual_seed(seed)
        with autocast(device, precision):
            logits = model(input_ids=ids).logits
        once = len(recomputed)
        F.cross_entropy(logits.float().flatten(0, 1), torch.arange(ids.numel(), device=device) % 3).backward()
        assert (len(recomputed) > once) == checkpointed, "the forward pass was not recomputed"
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        results.append(torch.cat(gradients).double())
    plain, saved, other = results
    figures["error"], effect = _error(saved, plain), _error(other, plain)
    figures["other dropout"] = effect
    # With reentrant checkpointing each layer runs the MLP again, and sums are computed in another order.
    allowed = FLOOR[precision] * 2
    assert figures["error"] <= allowed, f"an error of {figures['error']:.3g}; {allowed:.3g} is allowed"
    assert effect > 2 * allowed, f"other dropout changes the gradients by {effect:.3g} only"
