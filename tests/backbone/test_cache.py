"""The view of a cache: a token is written once and nothing else copied, and nothing of an old prefix is left in it."""

import copy
import operator

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.backbone import cache as cache_module
from prefix_adapter.backbone import masks as masks_module
from prefix_adapter.backbone.cache import PrefixCache

TOKENS = tiny.ids(2, 12, seed=3)
CONFIG = tiny.config("llama")
MLP = {"prefix_projection": True, "encoder_hidden_size": 12}


class AnyOtherCache(DynamicCache):
    """The same cache, but none that the view knows to be plain: it does all the work itself."""


class AnyOtherStaticCache(StaticCache):
    """Likewise."""


def wrapped(kind="llama", names=("default",), **settings):
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)
    model = get_peft_model(tiny.model(kind, "AutoModelForCausalLM"), config)
    for name in names[1:]:
        length = 5 if name == "as long" else 3
        model.add_adapter(name, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=length))
    tiny.randomize(model)
    return model.eval()


def new_cache(cache_class, model):
    """As generate makes it; the layers of `AnyOtherCache` come with the first tokens."""
    if issubclass(cache_class, StaticCache):
        return cache_class(config=model.config, max_cache_len=TOKENS.shape[1] + 2)
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
    model.base_model.prefix_layer.clear_cache()


def switch(step, model, cache):
    model.set_adapter("other" if step % 2 else "default")


def switch_to_one_as_long(step, model, cache):
    model.set_adapter("as long" if step % 2 else "default")


def side_by_side(step, model, cache):
    model.base_model.set_adapter(["default", "other"] if step % 2 else ["other"])


def disable(step, model, cache):
    (model.base_model.disable_adapter_layers if step % 2 else model.base_model.enable_adapter_layers)()


def crop(step, model, cache):
    cache.crop(-1)


def reorder(step, model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))


DYNAMIC, STATIC = (DynamicCache, AnyOtherCache), (StaticCache, AnyOtherStaticCache)
BETWEEN = [write, write_data, switch, switch_to_one_as_long, side_by_side, disable, reorder]


# One that is copied, one that is given room to grow, and one that turns from the first to the second.
@pytest.mark.parametrize("small", [10**9, 0, 2 * 2 * 8 * 6 * 4])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("between", "classes"),
    [*((each, DYNAMIC) for each in [*BETWEEN, crop]), *((each, STATIC) for each in BETWEEN)],
)
def test_a_plain_cache_is_as_any_other(between, classes, frozen, small, monkeypatch):
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", small)
    monkeypatch.setattr(cache_module, "_SPARE_TOKENS", 2)  # so that there is no more room now and then
    results = []
    for cache_class in classes:
        model = wrapped(names=("default", "other", "as long"))
        model.base_model.prefix_layer.requires_grad_(not frozen)
        cache = new_cache(cache_class, model)
        results.append((in_steps(model, cache, between), cache))
    (outputs, cache), (expected, other) = results
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    for layer, right in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), (right.keys, right.values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("settings", [{}, MLP], ids=["table", "mlp"])
def test_a_cache_goes_on_from_a_copy(settings, cache_class, monkeypatch):
    """A prompt that is computed once and copied, as transformers' guide to caches has it; and with a copied model."""
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", 0)
    model = wrapped(**settings)
    model.requires_grad_(False)
    expected = in_steps(model, AnyOtherCache())
    cache = new_cache(cache_class, model)
    with torch.inference_mode():
        model(input_ids=TOKENS[:, :8], past_key_values=cache)
        for other in (model, copy.deepcopy(model)):
            copied = copy.deepcopy(cache)
            # One branch goes elsewhere, token by token; it may write over nothing of the others.
            for token in TOKENS[:, :3].split(1, dim=1):
                other(input_ids=token, past_key_values=copy.deepcopy(copied))
            logits = [other(input_ids=token, past_key_values=copied).logits for token in TOKENS[:, 8:].split(1, dim=1)]
            torch.testing.assert_close(torch.cat(logits, 1), expected[:, 8:], rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_shared_by_two_caches_is_written_by_one(monkeypatch):
    """A copy that shares tensors with the original, and both go on: what the base model's own cache can take."""
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", 0)
    model, cache = wrapped(), DynamicCache(config=tiny.config("llama"))
    with torch.no_grad():
        model(input_ids=TOKENS[:, :8], past_key_values=cache)
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        # In turns, with other tokens.
        ours, theirs = [], []
        for step in range(3):
            ours.append(model(input_ids=TOKENS[:, 8 + step, None], past_key_values=cache).logits)
            theirs.append(model(input_ids=TOKENS[:, step, None], past_key_values=other).logits)
        alone = [
            model(input_ids=torch.cat([TOKENS[:, :8], rest], 1)).logits for rest in (TOKENS[:, 8:11], TOKENS[:, :3])
        ]
    torch.testing.assert_close(torch.cat(ours, 1), alone[0][:, 8:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(theirs, 1), alone[1][:, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_cache_of_inference_mode_goes_on_outside(cache_class, monkeypatch):
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", 0)
    model = wrapped()
    expected = in_steps(model, AnyOtherCache())
    cache = new_cache(cache_class, model)
    with torch.inference_mode():
        model(input_ids=TOKENS[:, :8], past_key_values=cache)
    with torch.no_grad():
        if cache_class is StaticCache:
            # It counts in a tensor, and cannot go on by itself.
            with pytest.raises(RuntimeError, match="Inplace update to inference tensor"), model.disable_adapter():
                model(input_ids=TOKENS[:, 8:], past_key_values=cache)
            return
        logits = [model(input_ids=token, past_key_values=cache).logits for token in TOKENS[:, 8:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("small", [10**9, 0])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["keys and values", "one for both"])
@pytest.mark.parametrize("layer_class", [DynamicLayer, StaticLayer])
def test_the_layer_is_left_as_its_own_update_leaves_it(layer_class, shared, grad, graph, small, monkeypatch):
    """What we do in place of `update` of the two layers: should it come to do more than that, this fails."""
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", small)
    sides = 1 if shared else 2
    prefix = [torch.randn(1, 2, 5, 4) for _ in range(sides)]
    prefix = prefix[0], prefix[-1]
    settings = {"max_cache_len": 9} if layer_class is StaticLayer else {}
    own, done_by_us = (
        layer_class(**settings),
        DynamicCache() if layer_class is DynamicLayer else StaticCache(CONFIG, 9),
    )
    done_by_us.layers = [layer_class(**settings)]
    view = PrefixCache(done_by_us, 5, lambda *_: prefix)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        for step, length in enumerate((3, 1, 2)):
            new = [torch.randn(2, 2, length, 4) for _ in range(sides)]
            new = new[0], new[-1]
            expected = own.update(*new)
            update = torch.compile(view.update, backend="aot_eager", fullgraph=True) if graph and step else view.update
            both = update(*new, 0)
            assert (both[0] is both[1]) == shared or layer_class is StaticLayer or not grad
            for joined, part, before in zip(both, expected, prefix, strict=True):
                assert torch.equal(joined, torch.cat([before.expand(2, -1, -1, -1), part], dim=2))
            ours = {name: value for name, value in vars(done_by_us.layers[0]).items() if name != "prefix_buffer"}
            assert ours.keys() == vars(own).keys()
            for name, value in vars(own).items():
                same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
                assert same, name


class Written(TorchDispatchMode):
    """Counts the elements that are copied from one tensor into another."""

    COPIES = ("cat", "copy_", "clone", "_to_copy", "index_copy_", "index_copy", "constant_pad_nd")

    def __enter__(self):
        self.elements = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.COPIES:
            moved = args[-1] if "index_copy" in func.overloadpacket.__name__ else result
            self.elements += moved.numel()
        return result


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_token_does_not_copy_the_context(cache_class, frozen, monkeypatch):
    monkeypatch.setattr(cache_module, "_MIN_BUFFER_BYTES", 0)  # what is small may be copied
    model = wrapped()
    model.requires_grad_(not frozen)

    def copied(context):
        tokens = tiny.ids(2, context, seed=3)
        cache = StaticCache(model.config, context + 4) if cache_class is StaticCache else new_cache(cache_class, model)
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache)
            with Written() as written:
                model(input_ids=tokens[:, :1], past_key_values=cache)
        return written.elements

    few, many = copied(8), copied(40)
    with model.disable_adapter():
        base_few, base_many = copied(8), copied(40)
    assert base_few > 0
    # What a dynamic cache of its own copies, we do not. A static one copies nothing, but attention may (repeated heads
    # in older transformers). A mask and a few numbers may be longer; keys and values of 32 tokens more are
    # 2 x 3 x 2 x 2 x 8 x 32 elements.
    attention = base_many - base_few if cache_class is StaticCache else 0
    assert many - few <= attention + 2 * 32 * 2


def test_masks_are_widened_once_for_all_layers(monkeypatch):
    model, calls, widen = wrapped(), [], masks_module.widen_mask

    def count(*args):
        calls.append(args)
        return widen(*args)

    monkeypatch.setattr(masks_module, "widen_mask", count)
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


@pytest.mark.parametrize(("frozen", "settings"), [(True, {}), (False, MLP)], ids=["frozen table", "trained mlp"])
def test_steps_behind_a_static_cache_are_compiled_once(settings, frozen):
    """As transformers does it: the prompt as it is, then one graph for all tokens; a prefix that changes is seen."""
    model = wrapped(**settings)
    model.requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    inner = model.base_model.model
    forward = torch.compile(inner.forward, backend=count, fullgraph=True)

    def between(step, model, cache):
        if step == 4:
            inner.forward = forward
        if step == 8:
            write(step, model, cache)

    outputs = in_steps(model, new_cache(StaticCache, model), between)
    expected = in_steps(plain, AnyOtherCache(), lambda step, *rest: write(step, *rest) if step == 8 else None)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    nodes = graphs[0].graph.nodes
    joined = [node.meta["example_value"] for node in nodes if node.target is torch.cat]
    assert not [each for each in joined if each.dim() == 4 and each.shape[2] > 5 + 1], "the context is copied"
    # Inductor copies all of a tensor to write into a part of it, if that tensor is written to again.
    assert not [node for node in nodes if node.target is operator.setitem], "the context is copied"
