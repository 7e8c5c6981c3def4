"""Run functions of the project's tests on the device and in a precision, with the tolerance of that precision."""

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
import unittest
from types import ModuleType
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gpu import ROOT, Skip
from gpu.common import arithmetic, autocast, device_of

# Tolerances for the tests' tiny models, relative to the largest element. TF32 keeps as many digits as float16,
# bfloat16 three bits fewer. The results record the measured errors.
TOLERANCES = {"fp32": 3e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1.5e-1}


class Mark:
    """Stand-in for `pytest.mark`. It keeps the parameters of `parametrize` in the function's attribute `marks`."""

    def __getattr__(self, name):
        def mark(*arguments, **settings):
            def decorate(function):
                function.marks = [*getattr(function, "marks", []), (name, arguments, settings)]
                return function

            return decorate

        return mark


class Patches:
    """Stand-in for the fixture `monkeypatch`, with the one method that the tests here use."""

    def __init__(self):
        self.stack = contextlib.ExitStack()

    def setattr(self, target, name, value):
        """Set an attribute until the test ends."""
        self.stack.enter_context(mock.patch.object(target, name, value))


def fixture(*arguments, **settings):
    """Stand-in for `pytest.fixture`. Tests that need a fixture do not run here."""
    return (lambda function: function) if settings or not arguments else arguments[0]


def skip(reason):
    """Stand-in for `pytest.skip`."""
    raise Skip(reason)


def import_or_skip(name, reason=None):
    """Stand-in for `pytest.importorskip`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skip(reason or f"needs {name}") from None


def test_module(name):
    """Import a module of tests with a stand-in for pytest, which need not be installed on a machine with a GPU."""
    stand_in = ModuleType("pytest")
    stand_in.mark, stand_in.fixture = Mark(), fixture
    stand_in.raises = lambda error, match="": unittest.TestCase().assertRaisesRegex(error, match)
    stand_in.skip, stand_in.importorskip = skip, import_or_skip
    path = ROOT / "tests" / f"{name}.py"
    for folder in (path.parent, ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
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
    """Yield the parametrized settings of a test, each with a name."""
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


class DrawOnCpu(TorchFunctionMode):
    """Draw random numbers of a CPU generator on the CPU, and move them to the device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and kwargs.get("device") is None:
            if args and isinstance(args[0], torch.Tensor):  # a method that fills a tensor
                return args[0].copy_(function(args[0].cpu(), *args[1:], **kwargs))
            return function(*args, **{**kwargs, "device": "cpu"}).to(self.device)
        return function(*args, **kwargs)


class Close:
    """Replacement for the tests' comparisons, with the tolerance of the precision. `worst` is the largest error."""

    def __init__(self, tolerance):
        self.tolerance, self.worst = tolerance, 0.0

    def error(self, actual, expected):
        """Return the largest difference, relative to the largest expected element."""
        actual, expected = actual.detach().double(), expected.detach().double()
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
        if not expected.numel():
            return 0.0
        return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()

    def assert_close(self, actual, expected, *_, **__):
        """Replace `torch.testing.assert_close` and the tests' `assert_equal`."""
        pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
        for one, other in pairs:
            error = self.error(one, other)
            self.worst = max(self.worst, error)
            # `<=` also fails for NaN.
            assert error <= self.tolerance, f"an error of {error:.3g}; {self.tolerance:.3g} is allowed"

    def allclose(self, actual, expected, *_, **__):
        """Replace `torch.allclose`."""
        error = self.error(actual, expected)
        if error <= self.tolerance:
            self.worst = max(self.worst, error)
        return error <= self.tolerance

    def assert_differ(self, one, other, *_, **__):
        """Check that the test can detect a missing prefix: the difference must exceed the tolerance."""
        assert self.error(one, other) > 2 * self.tolerance, "the result without a prefix is the same"


def _decoders(case):
    return case.get("kind") != "t5" and case.get("mixture") != "base for all"


def _weights_in_half(case):
    return case["autocast"] is None and case["weights"] != torch.float32


def _not_compiled(case):
    # On a GPU, transformers compiles these steps, and the compiler fails under `DrawOnCpu`.
    return case["settings"].get("cache_implementation") != "static"


def _written_in_place(case):
    return case["small"] == 0


# Test module, function, and a filter for its settings; `None` for all.
REFERENCES = [
    ("prefix/test_reference", "test_paper", None),
    ("prefix/test_reference", "test_peft_prefix_tuning", None),
    ("prefix/test_reference", "test_peft_prefix_projection", None),
    ("prefix/test_reference", "test_causal_prefix_is_tokens", None),
    ("prefix/test_reference", "test_encoder_prefix_is_tokens", None),
    ("prefix/test_reference", "test_decoder_prefix_is_tokens", None),
    ("prefix/test_reference", "test_three_prefixes_in_one_table", None),
    ("prefix/test_reference", "test_padding_changes_nothing", None),
    ("prefix/test_reference", "test_eager_equals_sdpa", None),
    ("prefix/test_reference", "test_two_forwards_one_backward", None),
    ("prefix/test_mixed_batch", "test_forward", _decoders),
    ("prefix/test_mixed_batch", "test_forward_padded_on_the_left", _decoders),
    ("prefix/test_low_rank", "test_rows_of_a_mixed_batch_have_their_own_matrices", None),
    ("prefix/test_strength", "test_two_copies_at_half_the_strength_are_one_at_full_strength", None),
    ("backbone/test_attention_entry", "test_equals_the_cache_where_there_is_one", None),
    ("backbone/test_attention_entry", "test_modernbert_equals_one_pass_over_prefix_and_input", None),
    ("backbone/test_attention_entry", "test_albert_has_a_prefix_for_each_pass", None),
    ("backbone/test_attention_entry", "test_deberta_equals_hooks_on_its_projections", None),
]
# Tests that give the same in any precision, or that choose the precision themselves.
REFERENCES_ONCE = [
    ("prefix/test_reference", "test_disabled_is_the_backbone_bit_for_bit", None),
    ("prefix/test_reference", "test_half_precision", _weights_in_half),
    ("prefix/test_low_rank", "test_outputs_and_gradients_are_those_of_a_prefix_beside_pefts_lora", None),
    ("prefix/test_low_rank", "test_generation_with_beams_and_rows_of_their_own", None),
    ("prefix/test_low_rank", "test_gradient_checkpointing_has_the_same_gradients", None),
    ("prefix/test_strength", "test_strength_0_is_the_base_model_bit_for_bit", None),
    ("prefix/test_strength", "test_rows_have_strengths_of_their_own", None),
    ("prefix/test_strength", "test_generate", _not_compiled),
    ("prefix/test_strength", "test_tokens_behind_a_cache", None),
    ("prefix/test_mixed_batch", "test_which_adapter_is_active_does_not_matter", None),
    ("backbone/test_cache", "test_a_cache_goes_on_from_a_copy", None),
    ("backbone/test_cache", "test_a_layer_that_is_shared_by_two_caches_is_written_by_one", None),
    ("backbone/test_cache", "test_a_cache_of_inference_mode_goes_on_outside", None),
    ("backbone/test_cache", "test_a_frozen_prefix_that_was_used_in_inference_mode_lets_gradients_pass", None),
    ("backbone/test_cache", "test_a_plain_cache_is_as_any_other", _written_in_place),
]


def references(args, precision):
    """Run the project's tests against independent references, on the device and in a precision."""
    chosen = REFERENCES + (REFERENCES_ONCE if precision == "fp32" else [])
    for module, name, which in chosen[::4] if args.tiny and precision != "fp32" else chosen:
        yield name.removeprefix("test_"), reference_check(args, precision, module, name, which)


def reference_check(args, precision, module, name, which=None):
    """Return a check that runs a test with all its settings."""
    device = device_of(args)

    def call(figures):
        failed, figures["cases"], figures["worst"] = {}, 0, 0.0
        with torch.device(device), DrawOnCpu(device), arithmetic(precision):
            function = getattr(loaded(device, module), name)
            chosen = [each for each in cases(function) if which is None or which(each[1])]
            if args.tiny:
                chosen = chosen[-1:]
            for label, settings in chosen:
                close = Close(TOLERANCES[precision])
                error = run_test(function, settings, close, autocast(device, precision))
                figures["cases"] += 1
                if isinstance(error, Skip):
                    figures.setdefault("skipped cases", {})[label] = str(error)
                elif error:
                    failed[label] = error
                elif close.worst > figures["worst"]:
                    figures |= {"worst": close.worst, "worst case": label}
        assert figures["cases"], "no setting of the test was selected"
        skipped = figures.get("skipped cases", {})
        if len(skipped) == figures["cases"]:
            raise Skip("; ".join(sorted(set(skipped.values()))))
        if failed:
            figures["failed cases"] = {label: error.strip().rpartition("\n")[2] for label, error in failed.items()}
            label, error = next(iter(failed.items()))
            raise AssertionError(f"{len(failed)} of {figures['cases']} cases failed; {label}:\n{error}")

    return call


_LOADED = {}


def loaded(device, name):
    """Return a module of tests whose tensors are on the device."""
    if (device, name) not in _LOADED:
        try:
            _LOADED[device, name] = test_module(name)
        except ModuleNotFoundError as error:
            raise Skip(f"needs {error.name}") from error
    return _LOADED[device, name]


def run_test(function, settings, close, autocast):
    """Run a test with settings; return its traceback if it failed, its `Skip` if it was skipped, else `None`."""
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
        except Skip as reason:
            return reason
        except Exception:
            return traceback.format_exc(limit=-6)
    return None
