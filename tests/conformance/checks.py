"""Checks of a prefix on any backbone. The reference of each check does not use the code of the package.

A check receives a `Case`. It raises `AssertionError` if it fails, `Skip` if it does not apply. Its docstring is copied
to docs/backbones.md.
"""

from __future__ import annotations

import itertools
import math
import re
import unittest.mock
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
import zoo_modalities
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from zoo import NotBuilt

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config, UnsupportedBackboneError, get_peft_model
from prefix_adapter.backbone import causal
from prefix_adapter.backbone.causal import CausalMask

TOKENS = 3
TOLERANCE = 2e-4
NEW_TOKENS = 5


class Skip(Exception):
    """Raised by a check that does not apply to this model; the message is the reason."""


@dataclass
class Case:
    """A model type with a task. Each check builds and wraps its own model."""

    model_type: str
    task: str
    attn: str | None = None
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> bool:
        """Whether the model reads text alone."""
        return self.task in zoo.TASKS

    def base(self, dropout: float | None = 0.0) -> nn.Module:
        tiny_model = zoo.tiny_model if self.text else zoo_modalities.tiny_model
        return tiny_model(self.model_type, self.task, seed=self.seed, attn_implementation=self.attn, dropout=dropout)

    def wrapped(self, **changes: Any) -> nn.Module:
        """Return a wrapped model in eval mode, with a prefix that is large enough to change the outputs visibly."""
        settings = {"num_virtual_tokens": TOKENS, "prefix_dropout": 0.0, **self.config, **changes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.base(), PrefixTuningV2Config(**settings)).eval()
        redraw(model, self.seed)
        return model

    def inputs(self, model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
        if self.text:
            return zoo.tiny_inputs(base_of(model), self.task, seed=self.seed + 1, **kwargs)
        return zoo_modalities.tiny_inputs(base_of(model), self.model_type, self.task, seed=self.seed + 1, **kwargs)


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layer_of(model: nn.Module) -> nn.Module:
    return base_of(model).prefix_tuning_v2


def redraw(model: nn.Module, seed: int, std: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer_of(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return all logits of a task head, concatenated `[batch, ...]`; without logits, all outputs."""
    torch.manual_seed(0)  # some audio models (VibeVoice) draw noise in each forward
    result = model(**inputs, return_dict=True)
    # The logits of two towers compare rows with each other. Their embeddings do not.
    towers = ("text_embeds", "image_embeds")
    parts = [result[name] for name in towers] if all(result.get(name) is not None for name in towers) else []
    parts = parts or [v for k, v in result.items() if isinstance(v, Tensor) and "logits" in k]
    if not parts:
        parts = [v for v in result.values() if isinstance(v, Tensor) and v.is_floating_point()]
    rows = rows_of(model, inputs)
    return torch.cat([(p if p.shape[0] % rows else p.reshape(rows, -1)).float().flatten(1) for p in parts], dim=1)


def rows_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Return the number of rows of a batch. Token ids and logits of MusicGen have one for each codebook of a row."""
    base, tensors = base_of(model), [value for value in inputs.values() if isinstance(value, Tensor)]
    rows = tensors[0].shape[0]
    has_codes = type(base).__name__ in ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM")
    return rows // base.config.num_codebooks if has_codes else rows


def token_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=True).logits.float()


def close(ours: Tensor, reference: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)} is not {tuple(reference.shape)}"
    assert torch.isfinite(reference).all(), f"{what}: the reference is not finite"
    scale = max(1.0, reference.abs().max().item())
    gap = (ours - reference).abs().max().item() / scale
    assert gap <= tolerance, f"{what}: differs by {gap:.2g}"


def differs(one: Tensor, other: Tensor, what: str) -> None:
    # Relative to the median, because some heads set impossible answers to -1e6.
    assert (one - other).abs().max().item() > 5e-6 * other.abs().median().item(), f"{what}: no difference"


# ---- The checks


def effect_and_gradients(case: Case) -> None:
    """The prefix changes the output. Each element of each layer's K and V gets a gradient, in eval and train mode."""
    model = case.wrapped()
    inputs = case.inputs(model)
    with torch.no_grad():
        ours = outputs(model, inputs)
        with model.disable_adapter():
            differs(ours, outputs(model, inputs), "effect")
    table = layer_of(model).prefix_tuning_v2_embedding["default"].weight
    # A text does not reach an audio encoder.
    reached = set()
    for target in layer_of(model).targets:
        for slot in target.slots.values():
            target.module.register_forward_hook(lambda *_, slot=slot: reached.add(slot))
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        torch.manual_seed(0)
        result = outputs(model, inputs)
        (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert table.grad is not None, f"no gradient, training={training}"
        adapter = layer_of(model).adapters["default"]
        assert reached
        for slot, columns in adapter.columns.items():
            if slot not in reached:
                continue
            dead = (table.grad[:, columns] == 0).float().mean().item()
            if dead == 1 and not _is_used(case, inputs, slot, layer_of(model).targets):
                continue
            assert dead == 0, f"training={training}: {dead:.0%} of {slot.kind} layer {slot.layer} gets no gradient"


def _is_used(case: Case, inputs: dict[str, Any], slot: Any, targets: list[Any]) -> bool:
    """Whether the base model's output depends on an attention module. On an image that no text names it does not."""
    name = next(target.name for target in targets if slot in target.slots.values())
    base = case.base().requires_grad_(True)
    outputs(base, inputs).square().sum().backward()
    gradients = [parameter.grad for parameter in base.get_submodule(name).parameters()]
    return any(gradient is not None and gradient.any() for gradient in gradients)


def disabling(case: Case) -> None:
    """Disabling and unloading the adapter restore the outputs of the base model bit for bit."""
    # Frozen as by PEFT: torch uses other kernels for weights that need no gradient.
    base = case.base().eval().requires_grad_(False)
    inputs = case.inputs(base)
    with torch.no_grad():
        want = outputs(base, inputs)
        model = case.wrapped()
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), want), "disabled differs from the base"
        assert torch.equal(outputs(model.unload(), inputs), want), "unloaded differs from the base"


def masked_prefix(case: Case) -> None:
    """In a batch with a row that has a prefix, a row with a masked prefix gives the outputs of the base model."""
    model = case.wrapped()
    inputs = case.inputs(model)
    with torch.no_grad():
        try:
            mixed = outputs(model, {**inputs, "adapter_names": ["default", "__base__"]})
        except ValueError as error:
            if "`adapter_names` has 2 names for a batch of" in str(error):
                raise Skip("its input has no rows (packed patches): refused") from error
            raise
        ours = outputs(model, inputs)
        with model.disable_adapter():
            base = outputs(model, inputs)
    close(mixed[:1], ours[:1], "row with the prefix")
    close(mixed[1:], base[1:], "row without")
    differs(ours, base, "effect")


def strength(case: Case) -> None:
    """At the strength 0 outputs are the base model's bit for bit, near 0 almost; rows have strengths of their own."""
    model = case.wrapped()
    inputs = case.inputs(model)
    with torch.no_grad():
        full = outputs(model, inputs)
        with model.disable_adapter():
            base = outputs(model, inputs)
        with prefix_adapter.use_strength(model, 0):
            assert torch.equal(outputs(model, inputs), base), "strength 0 differs from the base"
        try:
            with prefix_adapter.use_strength(model, 1e-20):
                close(outputs(model, inputs), base, "strength near 0")
        except ValueError as error:
            if "the `strength` of a prefix must be 0 or 1 there" in str(error):
                raise Skip("no place for a strength: refused") from error
            raise
        with prefix_adapter.use_strength(model, 0.5):
            half = outputs(model, inputs)
        differs(half, base, "half the strength and the base")
        differs(half, full, "half the strength and the whole")
        try:
            with prefix_adapter.use_strength(model, [1.0, 0.5]):
                mixed = outputs(model, inputs)
        except ValueError as error:
            if "`use_strength` has 2 numbers for a batch of" in str(error):
                raise Skip("its input has no rows (packed patches): refused") from error
            raise
    close(mixed[:1], full[:1], "row at full strength")
    close(mixed[1:], half[1:], "row at half the strength")


def low_rank(case: Case) -> None:
    """With `lora_r`, outputs are those of a prefix beside PEFT's LoRA; each row has matrices of its own."""
    try:
        model = case.wrapped(lora_r=2)
    except ValueError as error:
        if isinstance(error, UnsupportedBackboneError) or "call no linear layer" not in str(error):
            raise
        raise Skip("no linear layers in attention: refused") from error
    reference, inputs = case.wrapped(), case.inputs(model)
    encoder = layer_of(model).encoder_of("default")
    linears = layer_of(model).adapters["default"].linears
    with torch.no_grad():
        layer_of(reference).encoder_of("default").embedding.weight.copy_(encoder.embedding.weight)
        alone = outputs(reference, inputs)
        names = "|".join(re.escape(name) for name in linears)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=names)
        try:
            inject_adapter_in_model(lora, base_of(reference), "lora")
        except ValueError as error:
            if "Cannot convert PEFT target(s)" not in str(error):
                raise
            raise Skip("PEFT has no LoRA for this model to compare with") from error
        for name, (rows, columns) in linears.items():
            layer = base_of(reference).get_submodule(name)
            # Our matrices are stored 16 times as large as they are used.
            layer.lora_A["lora"].weight.copy_(encoder.down.weight[:, rows] / 16)
            layer.lora_B["lora"].weight.copy_(encoder.up.weight[:, columns].T / 16)
        ours = outputs(model, inputs)
        close(ours, outputs(reference.eval(), inputs), "beside PEFT's LoRA")
        differs(ours, alone, "effect")
        with model.disable_adapter():
            base = outputs(model, inputs)
        try:
            mixed = outputs(model, {**inputs, "adapter_names": ["default", "__base__"]})
        except ValueError as error:
            if "has 2 names for a batch of" in str(error) or "tokens of all rows in one row" in str(error):
                raise Skip("rows of a batch cannot have their own matrices: refused; the rest passes") from error
            raise
    close(mixed[:1], ours[:1], "row with the matrices")
    close(mixed[1:], base[1:], "row without")


def mixed_shifts(case: Case) -> None:
    """Rows whose adapters shift positions by different lengths, or not at all, give the same outputs as alone."""
    try:
        model = case.wrapped(shift_positions=True)
    except ValueError as error:
        if isinstance(error, UnsupportedBackboneError) or "`shift_positions=True`" not in str(error):
            raise
        raise Skip("no positions that could be shifted") from error
    more = PrefixTuningV2Config(num_virtual_tokens=TOKENS + 2, shift_positions=True, **case.config)
    model.add_adapter("longer", more)
    redraw(model, case.seed)
    names = ["default", "longer", "__base__"]
    with torch.no_grad():
        inputs = case.inputs(model, batch=3)
        try:
            mixed = outputs(model, {**inputs, "adapter_names": names})
        except ValueError as error:
            if "cannot share a batch" in str(error) or "`adapter_names` has 3 names for a batch of" in str(error):
                raise Skip("one set of positions for all rows, or no rows: refused") from error
            if "`shift_positions` takes" in str(error) and not case.text:
                raise Skip("its input fills all positions: refused") from error
            raise
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            close(mixed[row], outputs(model, inputs)[row], f"row with {name}")
        with model.disable_adapter():
            base = outputs(model, inputs)
    close(mixed[2], base[2], "row without")
    differs(mixed[:2], base[:2], "effect")


def eager_and_sdpa(case: Case) -> None:
    """Eager and sdpa attention give the same outputs, with and without a mask."""
    if not case.base()._supports_sdpa:
        raise Skip("no sdpa")
    results: dict[str, list[Tensor]] = {}
    for attn in ("eager", "sdpa"):
        try:
            base = Case(case.model_type, case.task, attn, case.seed).base()
        except NotBuilt as error:
            raise Skip(str(error)) from error
        try:
            with torch.no_grad():
                outputs(base, case.inputs(base))
        except Exception as error:
            raise Skip(f"the base model cannot: {type(error).__name__}") from error
        model = Case(case.model_type, case.task, attn, case.seed, case.config).wrapped()
        inputs = case.inputs(model)
        padded = dict(inputs)
        if "attention_mask" in inputs:
            padded["attention_mask"] = inputs["attention_mask"].clone()
            padded["attention_mask"][..., 0, -2:] = 0
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        with torch.no_grad():
            results[attn] = [outputs(model, i) for i in (inputs, bare, padded)]
            with model.disable_adapter():
                results[attn] += [outputs(model, i) for i in (inputs, bare, padded)]
    for index, what in enumerate(("mask of ones", "no mask", "padding")):
        base_gap = (results["eager"][index + 3] - results["sdpa"][index + 3]).abs().max().item()
        if base_gap > TOLERANCE:
            continue  # the implementations of the base model itself disagree here
        close(results["sdpa"][index], results["eager"][index], what)


def padding(case: Case) -> None:
    """Padding on either side does not change the outputs of real tokens, if this holds for the base model."""
    if case.task not in ("CAUSAL_LM", "MASKED_LM", "TOKEN_CLS"):
        raise Skip("no output for each token")
    model = case.wrapped()
    inputs = case.inputs(model, batch=1)
    if "decoder_input_ids" in inputs:
        raise Skip("encoder-decoder")
    length = inputs["input_ids"].shape[1]
    placed = "position_ids" in names_of(base_of(model))
    if not placed and not any(target.bias for target in layer_of(model).targets):
        raise Skip("takes no position_ids")
    with torch.no_grad():
        for side, positions in itertools.product(("right", "left"), (True, False) if placed else (False,)):
            padded = pad(inputs, 3, side)
            if not positions:
                del padded["position_ids"]
            where = slice(0, length) if side == "right" else slice(3, None)
            with model.disable_adapter():
                base = token_logits(model, inputs)
                gap = (token_logits(model, padded)[:, where] - base).abs().max().item()
            if gap > TOLERANCE:
                continue
            ours = token_logits(model, inputs)
            what = f"{side} padding {'with' if positions else 'without'} position_ids"
            close(token_logits(model, padded)[:, where], ours, what)
            differs(ours, base, "effect")


def names_of(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)


def pad(inputs: dict[str, Tensor], by: int, side: str) -> dict[str, Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    left, right = (by, 0) if side == "left" else (0, by)
    mask = nn.functional.pad(mask, (left, right))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": nn.functional.pad(ids, (left, right), value=7), "attention_mask": mask,
            "position_ids": positions}  # fmt: skip


def reload(case: Case, folder: Any = None) -> None:
    """A saved adapter gives the same outputs bit for bit on a fresh base model."""
    import tempfile

    model = case.wrapped(prefix_projection=True)
    inputs = case.inputs(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = outputs(model, inputs)
        model.save_pretrained(scratch)
        again = prefix_adapter.PeftModel.from_pretrained(case.base().eval(), scratch).eval()
        assert torch.equal(outputs(again, inputs), want), "differs after reload"


def checkpointing(case: Case) -> None:
    """Gradient checkpointing, reentrant or not, gives the same gradients as without it."""
    if not case.base().supports_gradient_checkpointing:
        raise Skip("no gradient checkpointing")
    grads: dict[bool | None, Tensor] = {}
    for reentrant in (None, None, False, True):
        model = case.wrapped().train()
        inputs = case.inputs(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant is not None and not _base_checkpoints(case, reentrant):
            raise Skip("the base model cannot")
        torch.manual_seed(0)
        try:
            result = outputs(model, inputs)
        except ValueError as error:
            if reentrant and "use_reentrant" in str(error):
                continue  # rejected with an explanation, because gradients would be lost
            raise
        (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradient = layer_of(model).prefix_tuning_v2_embedding["default"].weight.grad
        if reentrant is None and None in grads and not torch.equal(gradient, grads[None]):
            raise Skip("draws random numbers that a seed does not fix")
        grads[reentrant] = gradient
    assert grads[None] is not None, "no gradient without"
    for reentrant in grads.keys() - {None}:
        assert grads[reentrant] is not None, f"no gradient, use_reentrant={reentrant}"
        close(grads[reentrant], grads[None], f"use_reentrant={reentrant}")


def _base_checkpoints(case: Case, reentrant: bool) -> bool:
    """Return whether the base model itself can be trained with gradient checkpointing."""
    base = case.base().train()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    try:
        outputs(base, case.inputs(base)).sum().backward()
    except RuntimeError:
        return False
    return True


def one_pass(case: Case) -> None:
    """With the keys and values of real tokens p as the prefix, the output for x equals the base model's output for
    [p; x] in one pass. Positions are shifted, so that x has the same positions as after p."""
    if case.task != "CAUSAL_LM":
        raise Skip("no decoder")
    base = case.base().eval()
    inputs = case.inputs(base, batch=1)
    if "decoder_input_ids" in inputs:
        raise Skip("encoder-decoder")
    front, x = inputs["input_ids"][:, :TOKENS], inputs["input_ids"][:, TOKENS:]
    with torch.no_grad():
        cache = getattr(base(input_ids=front, use_cache=True), "past_key_values", None)
        if cache is None:
            raise Skip("returns no cache")
        want = token_logits(base, {"input_ids": inputs["input_ids"]})[:, TOKENS:]
        alone = token_logits(base, {"input_ids": x})
        try:
            model = case.wrapped(shift_positions=True)
        except ValueError as error:
            if "shift_positions" in str(error):
                raise Skip("has no positions to shift") from error
            raise
        layer = layer_of(model)
        cache = getattr(cache, "self_attention_cache", cache)
        if layer.layers_without_prefix or any(hasattr(stored, "conv_states") for stored in cache.layers):
            raise Skip("hybrid: some layers have a state")
        windows = [getattr(target.module, "sliding_window", None) for target in layer.targets]
        if any(window and window < inputs["input_ids"].shape[1] for window in windows):
            raise Skip("its window hides p from the end of x")
        table = layer.prefix_tuning_v2_embedding["default"].weight
        for slot, columns in layer.adapters["default"].columns.items():
            stored = cache.layers[slot.layer]
            if stored.keys.shape[1] * stored.keys.shape[3] != slot.shape.key_columns:
                raise Skip("its cache does not hold the keys that attention receives")
            parts = [t[0].transpose(0, 1).flatten(1) for t in (stored.keys, stored.values)]
            table[:, columns] = torch.cat(parts, dim=1)
        ours = token_logits(model, {"input_ids": x})
    differs(want, alone, "effect")
    close(ours, want, "one pass")


def _can_generate(case: Case) -> nn.Module:
    if case.text and case.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise Skip("no generation")
    model = case.wrapped()
    if not base_of(model).can_generate():
        raise Skip("no generation")
    return model


def _generate(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the sequences, and the logits of every step."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **kwargs}
    inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    if len(inputs) > 2:  # a token that stands for an image would need another image
        kwargs.setdefault("suppress_tokens", sorted(id for id in zoo._special_ids(base_of(model).config) if id > 2))
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **kwargs)
        return result.sequences, torch.stack(result.logits).float()


def _agrees(case: Case, padded: bool, one: dict[str, Any], other: dict[str, Any], what: str, batch: int = 2) -> None:
    model = _can_generate(case)
    inputs = case.inputs(model, batch=batch)
    if padded and case.task in ("CAUSAL_LM", "MULTIMODAL_LM") and "attention_mask" in inputs:
        inputs = {k: v.clone() for k, v in inputs.items()}
        inputs["attention_mask"][0, :2] = 0
    with model.disable_adapter():
        try:
            base = [_generate(model, inputs, **kwargs) for kwargs in (one, other)]
        except Exception as error:
            raise Skip(f"the base model cannot: {type(error).__name__}") from error
    (sequences, logits), (others, other_logits) = base
    if not torch.equal(sequences, others) or (logits - other_logits).abs().max() > TOLERANCE * logits.abs().max():
        raise Skip("the base model itself gives different results")
    try:
        (sequences, logits), (others, other_logits) = (_generate(model, inputs, **kwargs) for kwargs in (one, other))
    except ValueError as error:
        if "padded on the left by different lengths" in str(error):
            raise Skip("rejected with an explanation: uneven left padding") from error
        raise
    assert torch.equal(sequences, others), f"{what}: {sequences.tolist()} is not {others.tolist()}"
    close(logits, other_logits, what)


def generate_greedy(case: Case) -> None:
    """Greedy search gives the same tokens and logits with and without a cache."""
    _agrees(case, False, {}, {"use_cache": False}, "greedy")


def generate_left_padded(case: Case) -> None:
    """The same for greedy search on a left-padded batch."""
    _agrees(case, True, {}, {"use_cache": False}, "left-padded")


def generate_beams(case: Case) -> None:
    """The same for beam search on a left-padded batch."""
    _agrees(case, True, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}, "beams")


def generate_sampling(case: Case) -> None:
    """The same for sampling with a seed on a left-padded batch."""
    _agrees(case, True, {"do_sample": True}, {"do_sample": True, "use_cache": False}, "sampling")


def generate_static(case: Case) -> None:
    """A static cache gives the same as a dynamic cache."""
    _agrees(case, True, {"cache_implementation": "static", "disable_compile": True}, {}, "static cache")


def generate_prompt_lookup(case: Case) -> None:
    """Prompt-lookup decoding, which crops the cache after each guess, gives the same as greedy search."""
    _agrees(case, False, {"prompt_lookup_num_tokens": 2}, {}, "prompt lookup", batch=1)


def embeddings(case: Case) -> None:
    """`inputs_embeds` gives the same outputs as `input_ids`."""
    model = case.wrapped()
    inputs = case.inputs(model)
    if "input_ids" not in inputs:
        raise Skip("no token ids")

    def embedded() -> dict[str, Tensor]:
        # Computed for each call, because some backbones change them in place.
        embeddings = base_of(model).get_input_embeddings()(inputs["input_ids"])
        return {"inputs_embeds": embeddings, **{k: v for k, v in inputs.items() if k != "input_ids"}}

    try:
        with torch.no_grad(), model.disable_adapter():
            gap = (outputs(model, embedded()) - outputs(model, inputs)).abs().max().item()
    except Exception as error:
        raise Skip(f"the base model cannot: {type(error).__name__}") from error
    if gap > TOLERANCE:
        raise Skip("the base model itself gives different results")
    with torch.no_grad():
        ours = outputs(model, inputs)
        close(outputs(model, embedded()), ours, "embeddings")
        with model.disable_adapter():
            differs(ours, outputs(model, inputs), "effect")


def compiled(case: Case) -> None:
    """`torch.compile` compiles the model into one graph if it does so for the base model, with the same outputs."""
    base = case.base().eval().requires_grad_(False)
    inputs = case.inputs(base)
    try:
        with torch.no_grad():
            torch._dynamo.reset()
            gap = outputs(torch.compile(base, backend="eager", fullgraph=True), inputs) - outputs(base, inputs)
    except Exception as error:
        raise Skip(f"the base model cannot: {type(error).__name__}") from error
    if gap.abs().max() > TOLERANCE:
        raise Skip("the base model itself gives different results")
    model = case.wrapped()
    with torch.no_grad():
        want = outputs(model, inputs)
        torch._dynamo.reset()
        ours = outputs(torch.compile(base_of(model), backend="eager", fullgraph=True), inputs)
        torch._dynamo.reset()
    close(ours, want, "compiled")


def causal_rule(case: Case) -> None:
    """If only the prefix needs a mask, attention by the kernel's causal rule gives the same as with that mask."""

    def run(tokens_for_a_mask: float, groups: bool) -> tuple[Tensor, Tensor]:
        with unittest.mock.patch.object(causal, "_MIN_TOKENS_PER_PREFIX_TOKEN", tokens_for_a_mask):
            torch.manual_seed(0)
            model = case.wrapped()
            for target in layer_of(model).targets:
                target.groups = target.groups if groups else 1
            masks = ("attention_mask", "decoder_attention_mask")
            inputs = {k: v for k, v in case.inputs(model).items() if k not in masks}
            result = outputs(model, inputs)
            (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradient = layer_of(model).prefix_tuning_v2_embedding["default"].weight.grad
        assert gradient is not None
        return result.detach(), gradient

    used = []
    with unittest.mock.patch.object(CausalMask, "_attend", _noting(CausalMask._attend, used)):
        ours = [run(0, True), run(math.inf, True)]
    if not any(output is not None for output in used):
        raise Skip("attention never uses the rule")
    want, want_gradient = run(math.inf, False)
    for outputs_, gradient in ours:
        close(outputs_, want, "outputs")
        close(gradient, want_gradient, "gradients")


def _noting(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    return noting


def mask_of_ones(case: Case) -> None:
    """A mask that shows all tokens gives the same outputs as no mask."""
    model = case.wrapped()
    inputs = case.inputs(model)
    if "attention_mask" not in inputs:
        raise Skip("no mask")
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        with model.disable_adapter():
            gap = (outputs(model, inputs) - outputs(model, bare)).abs().max().item()
        if gap > TOLERANCE:
            raise Skip("the base model itself gives different results")
        close(outputs(model, inputs), outputs(model, bare), "mask of ones")


def generate_as_trained(case: Case) -> None:
    """The logits of each step of greedy search are those of one forward over the whole sequence, as in training."""
    model = _can_generate(case)
    inputs = case.inputs(model)

    def compare() -> tuple[Tensor, Tensor]:
        sequences, logits = _generate(model, inputs)
        steps = logits.shape[0]
        name = "decoder_input_ids" if base_of(model).config.is_encoder_decoder else "input_ids"
        if name not in inputs and name not in names_of(base_of(model)):
            raise Skip("no token ids")
        whole = {**inputs, name: sequences[:, :-1]}
        if name == "input_ids":
            more = sequences.shape[1] - 1 - inputs[name].shape[1]
            for other in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                if other in inputs:
                    whole[other] = nn.functional.pad(inputs[other], (0, more), value=int(other == "attention_mask"))
        return token_logits(model, whole)[:, -steps:].transpose(0, 1), logits

    with torch.no_grad():
        with model.disable_adapter():
            try:
                whole, steps = compare()
                gap = (whole - steps).abs().max().item()
            except Exception as error:
                raise Skip(f"the base model cannot: {type(error).__name__}") from error
        if gap > TOLERANCE * max(1.0, steps.abs().max().item()):
            raise Skip("the base model itself gives different results")
        close(*compare(), "one forward")


def two_turns(case: Case) -> None:
    """Two turns with a user's own cache give the same logits as one pass over both."""
    if case.task != "CAUSAL_LM":
        raise Skip("no decoder")
    model = case.wrapped()
    inputs = case.inputs(model, batch=1)
    ids = inputs["input_ids"]

    def in_turns() -> Tensor:
        first = model(input_ids=ids[:, :3], use_cache=True)
        return model(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True).logits.float()

    with torch.no_grad():
        with model.disable_adapter():
            try:
                base = in_turns()
                gap = (base - token_logits(model, {"input_ids": ids})[:, 3:]).abs().max().item()
            except Exception as error:
                raise Skip(f"the base model cannot: {type(error).__name__}") from error
        if gap > TOLERANCE:
            raise Skip("the base model itself gives different results")
        close(in_turns(), token_logits(model, {"input_ids": ids})[:, 3:], "two turns")


def far_window(case: Case) -> None:
    """A token far beyond a sliding window still attends to the prefix: one layer's prefix alone changes its output."""
    if case.task != "CAUSAL_LM":
        raise Skip("no decoder")
    model = case.wrapped()
    layer = layer_of(model)
    modules = [target.module for target in layer.targets]
    configs = [getattr(module, "config", None) for module in modules]
    if not any(getattr(part, "sliding_window", None) for part in (*modules, *configs)):
        raise Skip("no sliding window")
    inputs = case.inputs(model, batch=1, length=40)
    with torch.no_grad():
        for slot in layer.adapters["default"].columns:
            alone = case.wrapped(layers_to_transform=[slot.layer])
            ours = token_logits(alone, inputs)
            with alone.disable_adapter():
                base = token_logits(alone, inputs)
            differs(ours[:, -1], base[:, -1], f"layer {slot.layer} at the last token")


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        effect_and_gradients, disabling, masked_prefix, strength, low_rank, mixed_shifts, eager_and_sdpa, padding,
        reload, checkpointing, one_pass, generate_greedy, generate_left_padded, generate_beams, generate_sampling,
        generate_static, generate_prompt_lookup, generate_as_trained, mask_of_ones, two_turns, embeddings,
        compiled, causal_rule, far_window,
    )
}  # fmt: skip
