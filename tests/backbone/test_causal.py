"""The rule in place of a mask: the same attention, a mask to everything but sdpa, and used where it is to be."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations import sdpa_attention

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.backbone import causal, masks
from prefix_adapter.backbone.causal import CausalMask

TOKENS, LENGTH = 40, 3


def by_hand(tokens=TOKENS, length=LENGTH):
    rows, columns = torch.arange(tokens)[:, None], torch.arange(length + tokens)
    return (columns < length + rows + 1)[None, None]


def tensors(heads=4, groups=4, keys=LENGTH + TOKENS, size=8, values=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, TOKENS, size), (2, groups, keys, size), (2, groups, keys, values)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [({}, {}), ({}, {"scale": 0.3}), ({"groups": 2}, {"enable_gqa": True}), ({"values": 6}, {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 10**9], ids=["square", "mask"])
def test_it_is_attention_with_the_mask(shapes, settings, dtype, rows, monkeypatch):
    monkeypatch.setattr(causal, "_MIN_TOKENS_PER_PREFIX_TOKEN", rows)
    results = []
    for mask in (CausalMask(TOKENS, LENGTH, torch.device("cpu")), by_hand()):
        inputs = tensors(**shapes, dtype=dtype)
        output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=0.0, **settings)
        output.square().sum().backward()
        assert type(output) is torch.Tensor
        results.append([output.detach(), *(each.grad for each in inputs)])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)


def test_keys_of_another_number_get_the_mask_itself():
    """A module may cut it to its own keys, or have fewer of them: it is told what a plain mask would tell it."""
    mask = CausalMask(TOKENS, LENGTH, torch.device("cpu"))
    queries, keys, values = tensors(keys=LENGTH + TOKENS - 2)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    cut = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[..., :-2])
    right = F.scaled_dot_product_attention(queries, keys, values, attn_mask=by_hand()[..., :-2])
    torch.testing.assert_close(cut, right)
    with pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=True)


def test_a_mask_to_everything_else():
    mask, right = CausalMask(TOKENS, LENGTH, torch.device("cpu")), by_hand()
    assert mask.shape == right.shape and mask.dtype == torch.bool and mask.device == right.device and mask.dim() == 4
    assert not mask.requires_grad and not mask.is_floating_point()
    for use in (
        lambda each: each[:, :, 3:, 2:],
        lambda each: each.to(torch.float32),
        lambda each: each.to(torch.device("cpu"), torch.float64),
        lambda each: each.expand(2, 4, -1, -1),
        lambda each: ~each,
        lambda each: torch.where(each, 0.0, -1.0),
        lambda each: torch.zeros(TOKENS, LENGTH + TOKENS).masked_fill(~each, -1.0),
        lambda each: F.pad(each, (1, 0), value=True),
        lambda each: torch.cat([each, each]),
        lambda each: each.sum(),
        lambda each: torch.finfo(torch.float32).min * each,
        lambda each: each.clone(),
    ):
        result = use(mask)
        assert type(result) is torch.Tensor
        assert torch.equal(result, use(right))
    assert torch.equal(mask.plain(), right)
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1  # one element, whatever its shape


@pytest.mark.parametrize("rows", [0, 10**9], ids=["square", "mask"])
def test_of_repeated_keys_one_is_kept(rows, monkeypatch):
    monkeypatch.setattr(causal, "_MIN_TOKENS_PER_PREFIX_TOKEN", rows)
    results = []
    for mask in (CausalMask(TOKENS, LENGTH, torch.device("cpu"), groups=2), by_hand()):
        queries, keys, values = tensors(groups=2)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            repeated = [each.repeat_interleave(2, dim=1) for each in (keys, values)]
            output = F.scaled_dot_product_attention(queries, *repeated, attn_mask=mask)
        output.square().sum().backward()
        results.append([output.detach(), queries.grad, keys.grad, values.grad])
        single = [each for each in kept if each.shape == keys.shape and each.untyped_storage().nbytes() == keys.nbytes]
        assert len(single) == (2 if isinstance(mask, CausalMask) else 0)
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 10**9], ids=["square", "mask"])
@pytest.mark.parametrize("flash", [True, False])
def test_on_a_device_keys_stay_repeated_unless_flash_attention_shares_them(flash, rows, monkeypatch):
    """Neither with a mask nor where flash attention cannot run would a kernel of CUDA's take fewer keys."""
    monkeypatch.setattr(causal, "_MIN_TOKENS_PER_PREFIX_TOKEN", rows)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: flash and params.enable_gqa)
    inputs = [each.to("meta") for each in tensors()]
    sdpa, called = F.scaled_dot_product_attention, []

    def note(query, key, value, **kwargs):
        called.append((key.shape[1], value.shape[1], kwargs.get("enable_gqa", False)))
        return sdpa(query, key, value, **kwargs)

    mask = CausalMask(TOKENS, LENGTH, torch.device("meta"), groups=2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    assert CausalMask._attend(*inputs, attn_mask=mask).shape == inputs[0].shape
    assert called == [(2, 2, True) if flash and not rows else (4, 4, False)]


class SdpaCalls(TorchFunctionMode):
    """Notes the masks that sdpa is called with."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.masks.append(type(kwargs.get("attn_mask")))
        return func(*args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_where_it_is_used(kind, monkeypatch):
    """By a prompt that is long beside the prefix, in training and in generate; not by short ones or padded ones."""
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_dropout=0.0)
    model = get_peft_model(tiny.model(kind, "AutoModelForCausalLM", attn="sdpa"), config).eval()
    tiny.randomize(model)
    long, short = tiny.ids(2, 40), tiny.ids(2, 20)
    padded = torch.ones_like(long)
    padded[0, :5] = 0

    def masks(**inputs):
        with SdpaCalls() as calls:
            result = model(**inputs).logits
        return result, set(calls.masks) - {type(None)}

    ours, kinds = masks(input_ids=long)
    assert kinds == {CausalMask}
    assert masks(input_ids=long, attention_mask=torch.ones_like(long))[1] == {CausalMask}
    # In training it keeps keys that are one for several queries from being kept for each.
    assert masks(input_ids=short)[1] == {CausalMask if kind == "llama" else torch.Tensor}
    with torch.no_grad():
        assert masks(input_ids=short)[1] == {torch.Tensor}
    assert masks(input_ids=long, attention_mask=padded)[1] == {torch.Tensor}
    for target in model.base_model.prefix_layer.targets:
        target.groups = 1
    monkeypatch.setattr(causal, "_MIN_TOKENS_PER_PREFIX_TOKEN", 10**9)
    right, kinds = masks(input_ids=long)
    assert kinds == {torch.Tensor}
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [40, 7], ids=["long", "short"])
def test_training_keeps_one_key_for_all_queries_of_a_group(tokens):
    """As without a prefix, where there is no mask: with one transformers repeats keys and values for each query."""
    base = tiny.model("llama", "AutoModelForCausalLM", attn="sdpa")
    few, many, size = base.config.num_key_value_heads, base.config.num_attention_heads, base.config.head_dim
    assert few < many
    model = get_peft_model(base, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_dropout=0.0))
    tiny.randomize(model)
    targets = model.base_model.prefix_layer.targets
    table = model.base_model.prefix_layer.prefix_tuning_v2_embedding["default"].weight
    results, ids = [], tiny.ids(2, tokens)
    for heads in (few, many):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            output = model(input_ids=ids).logits
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append((output.detach(), table.grad))
        table.grad = None
        # Keys and values of each layer; queries of the long input have as many rows, and all of the heads.
        single = [each for each in kept if each.shape == (2, few, 2 + tokens, size)]
        assert len(single) == (2 * len(targets) if heads == few else 0)
        for target in targets:
            target.groups = 1
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_heads_that_are_repeated_in_another_way_are_left_alone(monkeypatch):
    """Were the first of each group taken for the others, outputs would be wrong: that is tried out at the start."""
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda states, times: states.repeat(1, times, 1, 1))
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args: False)
    model = tiny.model("llama", "AutoModelForCausalLM", attn="sdpa")
    model = get_peft_model(model, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert {target.groups for target in model.base_model.prefix_layer.targets} == {1}


def test_a_mask_is_made_once_for_all_layers(monkeypatch):
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, calls, make = get_peft_model(tiny.model("llama", "AutoModelForCausalLM"), config), [], masks.make_mask

    def count(*args):
        calls.append(args)
        return make(*args)

    monkeypatch.setattr(masks, "make_mask", count)
    model(input_ids=tiny.ids())
    assert len(calls) == 1 < model.config.num_hidden_layers
