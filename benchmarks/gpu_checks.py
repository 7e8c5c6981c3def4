"""The sections of gpu.py that check numbers on a device.

`references` runs the functions of the project's tests there, in a precision, with a tolerance of that precision.
`on_device` checks what a CPU has not got: sdpa's kernels, caches that leave the GPU, CUDA graphs, dropout that is drawn
again. There the truth is the backbone by itself in float64 with eager attention, with the prefix in a cache of
transformers' own, and the error allowed is a few times that of the same backbone in the same precision.

A section gives pairs of a name and a function. The function is given a dictionary for its figures, and raises if
something is wrong.
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import threading
import unittest
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import tiny
import torch
import torch.nn.functional as F
import transformers as tr
from gpu import ROOT, Skip
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.causal import CausalMask

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Of the tests' tiny models, relative to the largest element. TF32 keeps as many digits as float16, and bfloat16 three
# bits fewer. What is measured stands in the results.
TOLERANCES = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1.5e-1}


def device_of(args):
    """The GPU, or the CPU for a trial."""
    return torch.device("cpu" if args.tiny else "cuda")


@contextlib.contextmanager
def arithmetic(precision):
    """TF32 in matrix products, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device, precision):
    """What a step of training runs under."""
    return torch.autocast(device.type, HALF[precision]) if precision in HALF else nullcontext()


# ---- The machine


def environment(args):
    """What this was run on."""

    def call(figures):
        names = ("torch", "transformers", "peft", "accelerate", "numpy", "triton", "datasets", "flash-attn", "pytest")
        versions = {}
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        figures |= {"python": platform.python_version(), "versions": versions, "cpus": os.cpu_count()}
        import prefix_adapter

        figures["package"] = str(Path(prefix_adapter.__file__).parent)
        if args.tiny:
            figures["device"] = "cpu"
            return
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU here; --tiny tries the script on a CPU")
        properties = torch.cuda.get_device_properties(0)
        figures |= {"device": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
        figures |= {"capability": list(torch.cuda.get_device_capability()), "cudnn": torch.backends.cudnn.version()}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
            figures["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()

    yield "machine", call


# ---- The tests' references


class Mark:
    """`pytest.mark`, as far as the tests that run here use it: it keeps what a function is parametrized with."""

    def __getattr__(self, name):
        def mark(*arguments, **settings):
            def decorate(function):
                function.marks = [*getattr(function, "marks", []), (name, arguments, settings)]
                return function

            return decorate

        return mark


class Patches:
    """The fixture `monkeypatch`, as far as the tests that run here use it."""

    def __init__(self):
        self.stack = contextlib.ExitStack()

    def setattr(self, target, name, value):
        """Set an attribute until the test ends."""
        self.stack.enter_context(mock.patch.object(target, name, value))


def fixture(*arguments, **settings):
    """`pytest.fixture`: tests that need one do not run here."""
    return (lambda function: function) if settings or not arguments else arguments[0]


def test_module(name):
    """A module of tests; a machine with a GPU need not have pytest, and so it is given a stand-in for that."""
    stand_in = ModuleType("pytest")
    stand_in.mark, stand_in.fixture = Mark(), fixture
    stand_in.raises = lambda error, match="": unittest.TestCase().assertRaisesRegex(error, match)
    path = ROOT / "tests" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"gpu_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("pytest")
    sys.modules["pytest"] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("pytest")
        if before is not None:
            sys.modules["pytest"] = before
    return module


def cases(function):
    """The settings that a test is to run with, each with a name."""
    choices = []
    for _, (names, values), settings in (mark for mark in getattr(function, "marks", []) if mark[0] == "parametrize"):
        names = [each.strip() for each in names.split(",")] if isinstance(names, str) else list(names)
        rows = [dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values]
        labels = settings.get("ids")
        if not isinstance(labels, list):
            labels = ["-".join(getattr(part, "__name__", str(part)) for part in row.values()) for row in rows]
        choices.append(list(zip(labels, rows, strict=True)))
    for chosen in itertools.product(*choices):
        yield "-".join(label for label, _ in chosen), {key: each for _, row in chosen for key, each in row.items()}


class Drawn(TorchFunctionMode):
    """Draws on the CPU what a generator of the CPU is to draw, and moves it to the device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and kwargs.get("device") is None:
            return function(*args, **{**kwargs, "device": "cpu"}).to(self.device)
        return function(*args, **kwargs)


class Close:
    """Comparisons with a tolerance of the precision, in place of the tests' own, and the largest error seen."""

    def __init__(self, tolerance):
        self.tolerance, self.worst = tolerance, 0.0

    def error(self, actual, expected):
        """The largest difference, relative to the largest element that is expected."""
        actual, expected = actual.detach().double(), expected.detach().double()
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
        if not expected.numel():
            return 0.0
        return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()

    def assert_close(self, actual, expected, *_, **__):
        """`torch.testing.assert_close`, and the tests' own `assert_equal`."""
        pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
        for one, other in pairs:
            error = self.error(one, other)
            self.worst = max(self.worst, error)
            # Not `>`: a NaN is an error too.
            assert error <= self.tolerance, f"an error of {error:.3g}, where {self.tolerance:.3g} is allowed"

    def allclose(self, actual, expected, *_, **__):
        """`torch.allclose`."""
        error = self.error(actual, expected)
        if error <= self.tolerance:
            self.worst = max(self.worst, error)
        return error <= self.tolerance

    def assert_differ(self, one, other, *_, **__):
        """That a wrong result would be seen: without a prefix it is further off than what is allowed."""
        assert self.error(one, other) > 2 * self.tolerance, "without a prefix there is no other result"


def _decoders(case):
    return case.get("kind") != "t5" and case.get("mixture") != "base for all"


def _weights_in_half(case):
    return case["autocast"] is None and case["weights"] != torch.float32


def _written_in_place(case):
    return case["small"] == 0


# Test modules, functions, and which of their settings, where not all.
REFERENCES = [
    ("test_reference", "test_paper", None),
    ("test_reference", "test_peft_prefix_tuning", None),
    ("test_reference", "test_peft_prefix_projection", None),
    ("test_reference", "test_causal_prefix_is_tokens", None),
    ("test_reference", "test_encoder_prefix_is_tokens", None),
    ("test_reference", "test_decoder_prefix_is_tokens", None),
    ("test_reference", "test_three_prefixes_in_one_table", None),
    ("test_reference", "test_padding_changes_nothing", None),
    ("test_reference", "test_eager_equals_sdpa", None),
    ("test_reference", "test_two_forwards_one_backward", None),
    ("test_mixed_batch", "test_forward", _decoders),
    ("test_mixed_batch", "test_forward_padded_on_the_left", _decoders),
]
# Those that say the same in any precision, or choose their own.
REFERENCES_ONCE = [
    ("test_reference", "test_disabled_is_the_backbone_bit_for_bit", None),
    ("test_reference", "test_half_precision", _weights_in_half),
    ("test_mixed_batch", "test_which_adapter_is_active_does_not_matter", None),
    ("test_cache", "test_a_cache_goes_on_from_a_copy", None),
    ("test_cache", "test_a_layer_that_is_shared_by_two_caches_is_written_by_one", None),
    ("test_cache", "test_a_cache_of_inference_mode_goes_on_outside", None),
    ("test_cache", "test_a_frozen_prefix_that_was_used_in_inference_mode_lets_gradients_pass", None),
    ("test_cache", "test_a_plain_cache_is_as_any_other", _written_in_place),
]


def references(args, precision):
    """The project's tests against independent references, on the device and in a precision."""
    for module, name, which in REFERENCES + (REFERENCES_ONCE if precision == "fp32" else []):
        yield name.removeprefix("test_"), reference_check(args, precision, module, name, which)


def reference_check(args, precision, module, name, which=None):
    """A check that runs a test with all its settings."""
    device = device_of(args)

    def call(figures):
        failed, figures["cases"], figures["worst"] = {}, 0, 0.0
        with torch.device(device), Drawn(device), arithmetic(precision):
            function = getattr(loaded(device, module), name)
            chosen = [each for each in cases(function) if which is None or which(each[1])]
            if args.tiny:
                chosen = chosen[-1:]
            for label, settings in chosen:
                close = Close(TOLERANCES[precision])
                error = run_test(function, settings, close, autocast(device, precision))
                figures["cases"] += 1
                if error:
                    failed[label] = error
                elif close.worst > figures["worst"]:
                    figures |= {"worst": close.worst, "worst case": label}
        assert figures["cases"], "no setting of the test is chosen"
        if failed:
            figures["failed cases"] = {label: error.strip().rpartition("\n")[2] for label, error in failed.items()}
            label, error = next(iter(failed.items()))
            raise AssertionError(f"{len(failed)} of {figures['cases']} cases failed; {label}:\n{error}")

    return call


_LOADED = {}


def loaded(device, name):
    """A module of tests, whose tensors were made on the device."""
    if (device, name) not in _LOADED:
        _LOADED[device, name] = test_module(name)
    return _LOADED[device, name]


def run_test(function, settings, close, autocast):
    """Run a test with settings; return the traceback if it failed."""
    module, patches = sys.modules.get(function.__module__), Patches()
    known = function.__globals__ if module is None else vars(module)
    own = {"assert_equal": close.assert_close, "assert_differ": close.assert_differ}
    torch.manual_seed(0)
    if "monkeypatch" in inspect.signature(function).parameters:
        settings = {**settings, "monkeypatch": patches}
    with (
        patches.stack,
        mock.patch.dict(known, {name: value for name, value in own.items() if name in known}),
        mock.patch.object(torch.testing, "assert_close", close.assert_close),
        mock.patch.object(torch, "allclose", close.allclose),
        autocast,
    ):
        try:
            function(**settings)
        except Exception:
            return traceback.format_exc(limit=-6)
    return None


# ---- What a CPU has not got

N, NEW = 5, 16
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
# Heads of 64, as flash attention likes them.
KINDS = {
    "grouped": ("llama", {**SIZES, "head_dim": 64, "num_key_value_heads": 2}),
    "ungrouped": ("llama", {**SIZES, "head_dim": 64, "num_key_value_heads": 4}),
    "encoder": ("bert", SIZES),
}
# An error may be this many times the plain backbone's own, or this large.
TIMES, FLOOR = 4, {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.5e-2}


class Subject:
    """A model with prefixes, the same backbone without, and the truth: the backbone in float64.

    Attributes:
        ours: the model with the adapters `names`, the first of which is active.
        plain: the same backbone with the same weights in the same precision.
        truth: the same weights in float64, with eager attention.
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
                self.table(name).copy_(torch.randn(self.table(name).shape, generator=generator))
        self.encoder or self.never_stop(self.ours.base_model.model, self.plain)

    def backbone(self, kind, attention):
        """The backbone, the same at every call."""
        model_type, sizes = KINDS[kind]
        auto_class = "AutoModelForTokenClassification" if self.encoder else "AutoModelForCausalLM"
        # In layers this wide the tests' own weights would be so large that rounding errors grow.
        sizes = {"initializer_range": 0.06, "max_position_embeddings": 2048, **sizes}
        sizes["num_hidden_layers"] = self.layers
        with torch.device(self.device):
            return tiny.model(model_type, auto_class, attn=attention, **sizes).requires_grad_(False)

    @staticmethod
    def never_stop(*models):
        """Let no token end what is generated."""
        for model in models:
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def table(self, name):
        """An adapter's table `[n, layers * 2 * heads * size]`."""
        return self.ours.base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding[name].weight

    def behind(self, model, table, ids, mask=None):
        """Logits of the plain backbone with a table as the first keys and values of its own cache."""
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
        """The same for each row by itself, without its padding: logits `[real tokens, vocabulary]`."""
        rows = (own[real.bool()][None] for own, real in zip(ids, mask, strict=True))
        return torch.cat([self.behind(model, table, own)[0] for own in rows])

    def judge(self, figures, ours, same, truth, without=None):
        """Compare ours and the plain backbone with the truth, and note both errors.

        `without` is the truth without a prefix: were ours that, it would have to be seen.
        """
        error, own = _error(ours, truth), _error(same, truth)
        figures |= {"error": max(error, figures.get("error", 0.0)), "backbone": max(own, figures.get("backbone", 0.0))}
        allowed = max(TIMES * own, FLOOR[self.precision])
        # Not `>`: a NaN is an error too.
        assert error <= allowed, f"an error of {error:.3g}, where the backbone's own is {own:.3g}"
        if without is not None:
            effect = _error(without, truth)
            assert effect > 3 * allowed, f"no prefix would be an error of {effect:.3g}: too little to be seen"


def _error(actual, expected):
    """The largest difference, relative to the largest element that is expected."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs().max() / expected.abs().max()).item()


def on_device(args, precision):
    """Kernels, caches, graphs and random numbers of the device."""
    half, checks = precision in HALF, []
    # One for all checks that leave it as it is; made when the first of them runs.
    subject = cache(partial(Subject, args, precision))

    def add(name, function, *arguments, limit=None, **settings):
        def call(figures):
            with arithmetic(precision):
                function(figures, args, precision, *arguments, **settings)

        if limit:
            call.limit = limit
        checks.append((name, call))

    for kind in KINDS:
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
    if precision != "tf32":
        add("killed and resumed", killed_and_resumed)
    if precision in ("fp32", "bf16"):
        add("compiled generation", compiled_generation, limit=150)
        add("compiled training step", compiled_training, limit=120)
    if args.tiny and precision != "fp32":
        checks = [each for each in checks if each[0] in TINY]
    return checks


# What a trial on the CPU runs in the other precisions too.
TINY = (
    "sdpa any, grouped",
    "CausalMask",
    "generate, dynamic cache",
    "flash_attention_2, grouped",
    "mixed batch, grouped",
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
    """Notes which of sdpa's kernels are called; the plain products of `math` are none."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            self.seen.add(name.removeprefix("_scaled_dot_product_"))
        return function(*args, **(kwargs or {}))


def _no_kernel(error):
    """Whether sdpa says that none of the kernels that it may use takes these inputs."""
    return isinstance(error, RuntimeError) and ("No available kernel" in str(error) or "No viable backend" in str(error))


def sdpa_backend(figures, args, precision, subject, kind, backend):
    """Logits, and gradients of the prefix, of inputs that are long, short and padded, with one of sdpa's kernels."""
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
            """The logits of the real tokens, and the gradient of the table."""
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
            if not _no_kernel(error):
                raise
            refused.append(name)
            found["backbone"] = "no kernel"
            continue
        try:
            with only(), Kernels() as kernels:
                logits, gradient = with_gradient(ours, table)
        except RuntimeError as error:
            # Behind a prefix a causal mask that is short, or padded, is a mask; flash attention takes none.
            if not _no_kernel(error) or (name == "long" and backend == "flash"):
                raise
            found["ours"] = "no kernel"
            continue
        found["kernels"] = sorted(kernels.seen)
        subject.judge(found, logits, same[0], truth[0], without)
        found["gradient"] = {}
        subject.judge(found["gradient"], gradient, same[1], truth[1])
        if backend == "any" and name == "long" and precision in HALF and subject.device.type == "cuda":
            assert kernels.seen, "a long input without padding gets none of the fused kernels"
    if len(refused) == 3:
        raise Skip(f"the backbone itself gets no {backend} kernel for these inputs here")


def causal_mask(figures, args, precision):
    """The rule in place of a mask, with each kernel, against the mask in float64."""
    device, dtype = device_of(args), HALF.get(precision, torch.float32)
    for backend, groups, tokens in itertools.product(("any", *BACKENDS), (1, 2), (24, 200)):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 4, tokens, 64), (2, 4 // groups, N + tokens, 64), (2, 4 // groups, N + tokens, 64)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        seen = torch.ones(tokens, N + tokens, dtype=torch.bool, device=device).tril(N)[None, None]

        def attend(mask, inputs, grouped=groups > 1):
            inputs = [each.clone().requires_grad_(True) for each in inputs]
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=grouped)
            output.double().square().sum().backward()
            return [output, *(each.grad for each in inputs)]

        with sdpa_kernel(SDPBackend.MATH):
            truth, same = attend(seen, [each.double() for each in inputs]), attend(seen, inputs)
        name = f"{backend}, {tokens} tokens, {groups} in a group"
        try:
            with nullcontext() if backend == "any" else sdpa_kernel(BACKENDS[backend]):
                ours = attend(CausalMask(tokens, N, device), inputs)
        except RuntimeError as error:
            if not _no_kernel(error) or backend in ("any", "math"):
                raise
            figures[name] = "no kernel"
            continue
        errors = [(_error(one, right), _error(other, right)) for one, other, right in zip(ours, same, truth, strict=True)]
        figures[name] = max(error for error, _ in errors)
        for error, own in errors:
            assert error <= max(TIMES * own, FLOOR[precision]), f"{name}: {error:.3g}, with a plain mask {own:.3g}"


def flash_attention_2(figures, args, precision, kind):
    """The package flash-attn, where it is installed."""
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
    """Logits of a batch, each row against the truth of its own adapter."""
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
    """Each row with an adapter of its own, in a forward and in generate with two kinds of cache."""
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
    """Prompts of which the first is padded on the left, and their mask."""
    ids = tiny.ids(rows, 12, seed=7).to(subject.device)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 0
    return ids, mask


def generate(subject, ids, mask, model=None, **options):
    """What is generated, with the logits of each token."""
    model = subject.ours if model is None else model
    asked = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **asked, **options)


def judge_generation(figures, subject, output, ids, mask, names=None):
    """Each token's logits against the truth for the tokens before it: so a tie can be broken either way."""
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
    """Generate with a kind of cache."""
    kind, subject = options.get("cache_implementation", ""), subject()
    if kind.startswith("offloaded") and args.tiny:
        raise Skip("needs a GPU to bring the cache back to")
    if kind == "quantized":
        return quantized(figures, subject)
    ids, mask = prompts(subject, len(names or "ab"))
    rows = {} if names is None else {"adapter_names": names}
    judge_generation(figures, subject, generate(subject, ids, mask, **options, **rows), ids, mask, names)


def quantized(figures, subject):
    """A cache that is quantised to 8 bits gives other logits: nearer to the truth than those without a prefix."""
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
    assert figures["error"] < 0.2 * effect, f"{figures['error']:.3g}; without a prefix it would be {effect:.3g}"


def _has_quantizer(name):
    """Whether transformers can quantise a cache with this."""
    return importlib.util.find_spec({"quanto": "optimum.quanto", "hqq": "hqq"}[name].partition(".")[0]) is not None


def two_turns(figures, args, precision, subject):
    """A cache of the user's own, filled by a forward and gone on with by generate."""
    subject = subject()
    ids, mask = prompts(subject)
    mask[:] = 1
    cache = DynamicCache(config=subject.ours.config)
    with torch.no_grad():
        subject.ours(input_ids=ids[:, :7], past_key_values=cache)
    judge_generation(figures, subject, generate(subject, ids, mask, past_key_values=cache), ids, mask)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1


def beams(figures, args, precision, subject):
    """Beam search reorders the cache; the same sequences come out without one."""
    subject = subject()
    ids, mask = prompts(subject)
    caches = {"no cache": {"use_cache": False}, "dynamic": {}, "static": CACHES["static cache"]}
    found = {}
    for name, options in caches.items():
        output = generate(subject, ids, mask, num_beams=3, output_scores=True, **options)
        found[name] = output.sequences, output.sequences_scores
    for name in ("dynamic", "static"):
        assert torch.equal(found[name][0], found["no cache"][0]), f"{name}: other sequences than without a cache"
        figures[name] = _error(found[name][1], found["no cache"][1])
        assert figures[name] < 1e-4
    plain = generate(subject, ids, mask, subject.plain, num_beams=3).sequences
    assert not torch.equal(plain, found["no cache"][0]), "without a prefix there is no other result"


# ---- Compiled


def needs_compiler(args):
    """Triton, and the compiler of torch, build their launchers with a C compiler."""
    if not args.tiny and not any(shutil.which(each) for each in (os.environ.get("CC", "cc"), "gcc", "clang")):
        raise Skip("needs a C compiler")


def compiled_generation(figures, args, precision):
    """Static caches in generate, which transformers compiles into CUDA graphs: right, and as few skips as without."""
    needs_compiler(args)
    subject = Subject(args, precision, names=("a", "b"), layers=1 if args.tiny else 3)
    options = {"cache_implementation": "static"}
    if args.tiny:  # on a CPU transformers compiles if it is told to
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
    # Another adapter, none, and the first again, without a reset.
    subject.ours.set_adapter("b")
    judge_generation(figures, subject, generate(subject, ids, mask, **options), ids, mask, ["b", "b"])
    if not args.tiny:  # where each of these takes another compilation
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
        assert ours[name] <= plain[name], f"{name}: {ours[name]}, without a prefix {plain[name]}"
    assert ours["breaks"] == plain["breaks"]
    if subject.device.type == "cuda":
        assert ours["graph launches"] >= plain["graph launches"] > 0, "CUDA graphs are not what runs"


def _launches(subject, call):
    """What a call returns, and how many CUDA graphs it launches."""
    if subject.device.type != "cuda":
        return call(), 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as seen:
        result = call()
        torch.cuda.synchronize()
    return result, sum(each.name == "cudaGraphLaunch" for each in seen.events())


def compiled_training(figures, args, precision):
    """Forward and backward of a compiled model, against those of the same that is not compiled."""
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
    """The gradients with checkpointing are those without: dropout is drawn again as it was, in the same precision."""
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
        assert (len(recomputed) > once) == checkpointed, "nothing was computed again"
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        results.append(torch.cat(gradients).double())
    plain, saved, other = results
    figures["error"], effect = _error(saved, plain), _error(other, plain)
    figures["other dropout"] = effect
    # Each layer runs the MLP anew if it is reentrant, and sums are taken in another order.
    allowed = FLOOR[precision] * 2
    assert figures["error"] <= allowed, f"{figures['error']:.3g}, where {allowed:.3g} is allowed"
    assert effect > 2 * allowed, f"another dropout changes only {effect:.3g}"


@contextlib.contextmanager
def fresh_accelerate():
    """An Accelerator leaves its precision and its device to every later one of the process."""
    try:
        yield
    finally:
        state = sys.modules.get("accelerate.state")
        if state is not None:
            state.AcceleratorState._reset_state(reset_partial_state=True)


STEPS, KILLED_AT = 12, 7


def train_loop(folder, device, precision, die=False):
    """A loop as a user writes one, with Accelerate: a checkpoint at every third step, and a start from the last one.

    Returns:
        The trained parameters, and the losses of the steps that were done here.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(
        mixed_precision=precision if precision in HALF else "no", cpu=device.type == "cpu", rng_types=["torch"]
    )
    set_seed(0)
    sizes = {**KINDS["encoder"][1], "initializer_range": 0.06}
    base = tiny.model("bert", "AutoModelForSequenceClassification", **sizes)
    config = PrefixTuningV2Config(
        task_type="SEQ_CLS", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=16, prefix_dropout=0.1
    )
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    saved = sorted(folder.glob("step-*"))
    start = 0
    if saved:
        accelerator.load_state(str(saved[-1]))
        start = int(saved[-1].name.partition("-")[2])
    rows = tiny.ids(8 * STEPS, 16, seed=5).to(accelerator.device)
    losses = []
    for step in range(start, STEPS):
        ids = rows[8 * step : 8 * step + 8]
        # Whether the first token is in the upper half: the head has to learn something.
        with accelerator.autocast():
            loss = model(input_ids=ids, labels=(ids[:, 0] > tiny.VOCAB // 2).long()).loss
        accelerator.backward(loss)
        if die and step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)  # between the backward pass and the step
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 3 == 0:
            accelerator.save_state(str(folder / f"step-{step + 1:03d}"))
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}, losses


def killed_and_resumed(figures, args, precision):
    """A run that is killed and gone on with ends where one ends that was not."""
    if importlib.util.find_spec("accelerate") is None:
        raise Skip("needs accelerate")
    device = device_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        whole, parts = Path(scratch, "whole"), Path(scratch, "parts")
        code = "import sys, pathlib, torch, gpu_checks; torch.set_num_threads(1); "
        code += "gpu_checks.train_loop(pathlib.Path(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3], die=True)"
        started = subprocess.Popen([sys.executable, "-c", code, str(parts), device.type, precision])
        with fresh_accelerate():
            expected, losses = train_loop(whole, device, precision)
        assert started.wait() == -signal.SIGKILL, f"the run that is to be killed ended with {started.returncode}"
        assert sorted(path.name for path in parts.iterdir()) == ["step-003", "step-006"]
        with fresh_accelerate():
            found, resumed = train_loop(parts, device, precision)
    assert len(resumed) == STEPS - 6 and found.keys() == expected.keys()
    figures["same to the bit"] = all(torch.equal(found[name], expected[name]) for name in found)
    figures["error"] = max(_error(found[name], expected[name]) for name in found)
    figures["loss"] = [round(losses[0], 4), round(losses[-1], 4)]
    assert all(map(_finite, losses))
    moved = _error(torch.tensor(losses[-3:]), torch.tensor(losses[6:9]))
    assert figures["error"] <= FLOOR[precision], f"{figures['error']:.3g}"
    assert moved > 0


def _finite(number):
    return number == number and abs(number) != float("inf")


# ---- The command


def missing_packages(extra="train"):
    """What of the package's extra, with all that its packages need themselves, is not installed."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(line) for line in project["optional-dependencies"][extra]]
    seen, missing = set(), []
    while waiting:
        requirement = waiting.pop(0)
        key = requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        for need in map(Requirement, needs):
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": each}) for each in extras):
                waiting.append(need)
    return sorted(set(missing))


def training_command(args):
    """`prefix-adapter train`, killed, resumed, and asked for answers."""

    def call(figures):
        missing = missing_packages()
        if missing:
            raise Skip(f"needs {', '.join(missing)}: bring wheels of them, with --wheels FOLDER")
        sys.path.insert(0, str(ROOT / "tests" / "training"))
        rows = test_module("training/conftest")
        with tempfile.TemporaryDirectory() as scratch:
            # Every file of rows would stay in the user's own cache.
            with mock.patch.dict(os.environ, {"HF_DATASETS_CACHE": f"{scratch}/cache"}):
                _train_by_command(figures, args, rows, Path(scratch))

    call.limit = 120
    yield "train, kill, resume, predict", call


def _train_by_command(figures, args, rows, folder):
    base = rows.save_base(folder / "base", "bert")
    data = {"train": rows.topic_rows(96), "validation": rows.topic_rows(32, 200)}
    options = ["--config", "sequence-classification", "--model", base, "--adapter.num_virtual_tokens", "4"]
    for name, own in data.items():
        options += [f"--data.{name}", rows.write_rows(folder / f"{name}.jsonl", own)]
    options += ["--num_train_epochs", "8", "--eval_steps", "6", "--batch_size", "8", "--max_length", "16"]
    options += ["--mixed_precision", "no" if args.tiny else "bf16"]

    def command(*arguments):
        from prefix_adapter.cli import main

        with fresh_accelerate():
            try:
                main(list(arguments))
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"prefix-adapter {arguments[0]}: {ended.code}") from ended

    # The run that is killed, and beside it, in this process, one that is not.
    parts = str(folder / "parts")
    killed = subprocess.Popen([sys.executable, "-m", "prefix_adapter", "train", *options, "--output_dir", parts])

    def kill():
        # Only after a whole checkpoint there is something to go on from.
        while killed.poll() is None and not list((folder / "parts").glob("checkpoints/step-*")):
            time.sleep(0.02)
        killed.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    command("train", *options, "--output_dir", str(folder / "whole"))
    killer.join()
    assert killed.wait() == -signal.SIGKILL, f"the run ended before it was killed, with status {killed.returncode}"
    command("train", "--resume", parts)
    results = [json.loads((folder / name / "results.json").read_text())["validation"] for name in ("parts", "whole")]
    figures["resumed"], figures["whole"] = results
    assert abs(results[0]["accuracy"] - results[1]["accuracy"]) < 0.04 and results[1]["accuracy"] > 0.9
    answers = folder / "answers.jsonl"
    command("predict", parts, str(folder / "validation.jsonl"), str(answers))
    figures["answers"] = len(answers.read_text().splitlines())
    assert figures["answers"] == len(data["validation"])
    if not args.tiny:
        figures["bytes on the GPU"] = torch.cuda.max_memory_allocated()
        assert figures["bytes on the GPU"] > 0
