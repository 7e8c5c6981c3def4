"""The view of a cache that grows: one copy a token, and nothing of an old prefix left in it."""

import copy

import pytest
import tiny
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter import attention as attention_module
from prefix_adapter.cache import PrefixCache

TOKENS = tiny.ids(2, 12, seed=3)
MLP = {"prefix_projection": True, "encoder_hidden_size": 12}


class AnyOtherCache(DynamicCache):
    """The same cache, but none that the view knows to be plain: it does all the work itself."""


def wrapped(kind="llama", names=("default",), **settings):
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)
    model = get_peft_model(tiny.model(kind, "AutoModelForCausalLM"), config)
    for name in names[1:]:
        model.add_adapter(name, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tiny.randomize(model)
    return model.eval()


def new_cache(cache_class, model):
    """As generate makes it for the first, with all of its layers; for the second they come with the first tokens."""
    return cache_class(config=model.config) if cache_class is DynamicCache else cache_class()


@torch.no_grad()
def in_steps(model, cache, between=lambda step, model, cache: None):
    """Logits of three tokens and then of one at a time."""
    outputs = [model(input_ids=TOKENS[:, :3], past_key_values=cache).logits]
    for step in range(3, TOKENS.shape[1]):
        between(step, model, cache)
        outputs.append(model(input_ids=TOKENS[:, step : step + 1], past_key_values=cache).logits)
    return torch.cat(outputs, dim=1)


def write(step, model, cache):
    """A step of training in between."""
    with torch.no_grad():
        for parameter in model.base_model.prefix_layer.parameters():
            parameter.add_(0.1 * step)


def write_data(step, model, cache):
    """The same past autograd's back: that has to be said."""
    for parameter in model.base_model.prefix_layer.parameters():
        parameter.data.mul_(1.1)
    model.base_model.prefix_layer.forget()


def switch(step, model, cache):
    model.set_adapter("other" if step % 2 else "default")


def side_by_side(step, model, cache):
    model.base_model.set_adapter(["default", "other"] if step % 2 else ["other"])


def disable(step, model, cache):
    (model.base_model.disable_adapter_layers if step % 2 else model.base_model.enable_adapter_layers)()


def crop(step, model, cache):
    cache.crop(-1)


def reorder(step, model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("between", [write, write_data, switch, side_by_side, disable, crop, reorder])
def test_a_cache_that_grows_is_as_any_other(between, frozen):
    results = []
    for cache_class in (DynamicCache, AnyOtherCache):
        model = wrapped(names=("default", "other"))
        model.base_model.prefix_layer.requires_grad_(not frozen)
        cache = new_cache(cache_class, model)
        results.append((in_steps(model, cache, between), cache))
    (outputs, cache), (expected, other) = results
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    for layer, right in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (right.keys, right.values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, MLP], ids=["table", "mlp"])
def test_a_cache_goes_on_from_a_copy(settings):
    """A prompt that is computed once and copied, as transformers' guide to caches has it; and with a copied model."""
    model = wrapped(**settings)
    model.requires_grad_(False)
    expected = in_steps(model, AnyOtherCache())
    cache = new_cache(DynamicCache, model)
    with torch.inference_mode():
        model(input_ids=TOKENS[:, :8], past_key_values=cache)
        for other in (model, copy.deepcopy(model)):
            logits = other(input_ids=TOKENS[:, 8:], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(logits, expected[:, 8:], rtol=1e-5, atol=1e-5)


def test_the_layer_is_left_as_its_own_update_leaves_it():
    """What we do in place of `DynamicLayer.update`: should it come to do more than to concatenate, this fails."""
    prefix = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    own, done_by_us = DynamicLayer(), DynamicCache()
    done_by_us.layers = [DynamicLayer()]
    view = PrefixCache(done_by_us, 5, lambda *_: prefix)
    for length in (3, 1, 2):
        new = torch.randn(2, 2, length, 4), torch.randn(2, 2, length, 4)
        expected = own.update(*new)
        both = view.update(*new, 0)
        for joined, part, before in zip(both, expected, prefix, strict=True):
            assert torch.equal(joined, torch.cat([before.expand(2, -1, -1, -1), part], dim=2))
        ours = vars(done_by_us.layers[0])
        assert ours.keys() == vars(own).keys()
        for name, value in vars(own).items():
            assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value, name


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_token_copies_the_context_once(frozen, monkeypatch):
    """The base model's own cache does; a prefix joined to what it returns would be a second copy."""
    model = wrapped()
    model.requires_grad_(not frozen)
    numbers, cat = [], torch.cat

    def count(tensors, *args, **kwargs):
        result = cat(tensors, *args, **kwargs)
        numbers.append(result.numel())
        return result

    def copied(adapter):
        cache = new_cache(DynamicCache, model)
        with torch.no_grad():
            for step in (TOKENS[:, :8], TOKENS[:, 8:9], TOKENS[:, 9:10]):
                numbers.clear()
                model(input_ids=step, past_key_values=cache)
        return sum(numbers)

    monkeypatch.setattr(torch, "cat", count)
    ours = copied("default")
    with model.disable_adapter():
        base = copied(None)
    layers, heads, size = 3, model.config.num_key_value_heads, model.config.head_dim
    assert model.config.num_hidden_layers == layers
    assert ours - base == 2 * layers * TOKENS.shape[0] * heads * 5 * size


def test_masks_are_widened_once_for_all_layers(monkeypatch):
    model, calls, widen = wrapped(), [], attention_module.widen_mask

    def count(*args):
        calls.append(args)
        return widen(*args)

    monkeypatch.setattr(attention_module, "widen_mask", count)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    with torch.no_grad():
        model(input_ids=TOKENS, attention_mask=mask)
    assert len(calls) == 1 < model.config.num_hidden_layers


def test_nothing_is_kept_of_a_forward_that_failed():
    """A layer called by itself afterwards computes with the parameters of now."""
    model = wrapped(**MLP)
    model.requires_grad_(False)
    layer = model.base_model.model.model.layers[0]
    failing = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=TOKENS)
    failing.remove()
    attention, states = layer.self_attn, torch.randn(2, 4, model.config.hidden_size)
    positions = model.base_model.model.model.rotary_emb(states, torch.arange(4).expand(2, -1))
    first = attention(states, positions, None)[0]
    with torch.no_grad():
        model.base_model.prefix_layer.encoder_of("default").output.weight.mul_(2)
    assert not torch.allclose(first, attention(states, positions, None)[0])


@pytest.mark.parametrize("settings", [{}, MLP], ids=["table", "mlp"])
def test_a_frozen_prefix_that_was_used_in_inference_mode_lets_gradients_pass(settings):
    model = wrapped(**settings)
    model.requires_grad_(False)
    states = torch.randn(2, 4, model.config.hidden_size)
    with torch.inference_mode():
        expected = model(inputs_embeds=states).logits
    states.requires_grad_()
    logits = model(inputs_embeds=states).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert states.grad.abs().sum() > 0
