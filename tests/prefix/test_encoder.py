"""Virtual tokens to keys and values: plain tensors."""

from functools import partial

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.backbone.key_values import KeyValueShape, prepend, split_layers
from prefix_adapter.prefix.encoder import EncoderSizes, PrefixEncoder

SHAPE = KeyValueShape(key_heads=2, key_size=3, value_heads=1, value_size=4)


def test_columns_are_in_the_order_of_the_reference():
    """Keys before values, heads, head size, as `view(n, 2, heads, size)` gives for equal sizes."""
    prefix = torch.arange(2 * 5 * 10.0).view(2, 5, 10)
    keys, values = SHAPE.split(prefix)
    assert keys.shape == (2, 2, 5, 3) and values.shape == (2, 1, 5, 4)
    for row, token in ((0, 0), (1, 4)):
        flat = torch.cat([keys[row, :, token].flatten(), values[row, :, token].flatten()])
        assert torch.equal(flat, prefix[row, token])


@pytest.mark.parametrize(
    "shapes",
    [
        3 * [KeyValueShape(2, 4, 2, 4)],
        2 * [SHAPE],
        [SHAPE, KeyValueShape(2, 4, 2, 4)],
        2 * [KeyValueShape(2, 3, 0, 0)],
    ],
    ids=["alike", "values apart", "layers apart", "keys alone"],
)
def test_all_layers_at_once_equal_single_layers(shapes):
    columns = [shape.columns for shape in shapes]
    results = []
    for at_once in (True, False):
        prefix = torch.randn(5, sum(columns), generator=torch.Generator().manual_seed(0)).requires_grad_()
        parts = prefix.unsqueeze(0).split(columns, dim=-1)
        pairs = (
            split_layers(prefix, shapes) if at_once else [s.split(part) for s, part in zip(shapes, parts, strict=True)]
        )
        weights = torch.Generator().manual_seed(1)
        sum((side * torch.randn(side.shape, generator=weights)).sum() for pair in pairs for side in pair).backward()
        results.append([prefix.grad, *(side.detach() for pair in pairs for side in pair)])
    for ours, right in zip(*results, strict=True):
        assert torch.equal(ours, right)


def test_join_puts_the_prefix_in_front_in_the_type_of_what_is_there():
    prefix = torch.randn(1, 5, 10)
    keys, values = torch.randn(3, 2, 7, 3).bfloat16(), torch.randn(3, 1, 7, 4).bfloat16()
    joined_keys, joined_values = prepend(SHAPE.split(prefix), (keys, values))
    assert joined_keys.shape == (3, 2, 12, 3) and joined_values.dtype == torch.bfloat16
    assert torch.equal(joined_keys[:, :, 5:], keys) and torch.equal(joined_values[:, :, 5:], values)
    assert torch.equal(joined_keys[2, 1, 4], prefix[0, 4, 3:6].bfloat16())
    shared = KeyValueShape(2, 3, 0, 0)
    one, other = prepend(shared.split(torch.randn(1, 5, 6)), (keys, keys))
    assert one is other and one.shape == (3, 2, 12, 3)


@pytest.mark.parametrize("width", [None, 6])
def test_some_columns_equal_those_of_the_whole_table(width):
    encoder = PrefixEncoder.new(EncoderSizes(length=5, columns=24, hidden_size=8, width=width), std=0.3)
    table = encoder.fold()
    assert table.shape == (5, 24)
    for start, stop in ((0, 10), (10, 24)):
        torch.testing.assert_close(encoder.encode(slice(start, stop)), table[:, start:stop])
    if width:
        by_hand = torch.tanh(encoder.embedding.weight @ encoder.hidden.weight.T + encoder.hidden.bias)
        torch.testing.assert_close(table, by_hand @ encoder.output.weight.T + encoder.output.bias)
        assert not encoder.hidden.bias.any() and not encoder.output.bias.any()


def test_the_mlp_costs_n_rows_whatever_the_batch():
    """The MLP runs once for the whole batch. In PEFT and in the reference it runs for each row."""

    def extra(batch):
        flops = []
        for projection in (True, False):
            config = PrefixTuningV2Config(num_virtual_tokens=6, prefix_projection=projection, prefix_dropout=0.0)
            model = get_peft_model(tiny.model("bert"), config)
            with FlopCounterMode(display=False) as counter:
                model(input_ids=tiny.ids(batch=batch))
            flops.append(counter.get_total_flops())
        return flops[0] - flops[1]

    columns, hidden = tiny.LAYERS * 2 * tiny.HIDDEN, tiny.HIDDEN
    assert extra(1) == extra(16) == 2 * 6 * hidden * (hidden + columns)


class Operations(TorchDispatchMode):
    """Records the names of operations and the sizes of their results."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements.append((func.overloadpacket.__name__, result.numel()))
        return result


@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "encoder_hidden_size": 7}])
def test_no_layer_makes_a_gradient_as_large_as_that_of_all(settings):
    """Such a copy would cost time and memory in the square of the number of layers."""
    config = PrefixTuningV2Config(num_virtual_tokens=6, prefix_dropout=0.0, **settings)
    model = get_peft_model(tiny.model("bert"), config)
    table = 6 * 2 * tiny.LAYERS * tiny.HIDDEN
    with Operations() as operations:
        model(input_ids=tiny.ids()).last_hidden_state.sum().backward()
    large = [name for name, elements in operations.elements if elements == table]
    assert large and "slice_backward" not in large
    assert large.count("cat") + large.count("addmm") + large.count("mm") < tiny.LAYERS


def in_checkpoint(forward, reentrant):
    def run(states, *args, **kwargs):
        return checkpoint(partial(forward, **kwargs), states, *args, use_reentrant=reentrant)

    return run


@pytest.mark.parametrize("whole", [False, True], ids=["each layer", "the model"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "encoder_hidden_size": 7}], ids=["table", "mlp"])
def test_checkpointing_outside_of_transformers(settings, reentrant, whole):
    """Checkpointing of FSDP, Accelerate or the user's own code, for which the model has no flag."""
    config = PrefixTuningV2Config(num_virtual_tokens=6, prefix_dropout=0.0, **settings)
    states = torch.randn(2, 7, tiny.HIDDEN)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model("bert"), config)
        tiny.randomize(model, std=0.3)
        inputs = states.clone().requires_grad_()
        if checkpointed and not whole:
            for layer in model.base_model.model.encoder.layer:
                layer.forward = in_checkpoint(layer.forward, reentrant)

        def run(embeddings, model=model):
            # Two forwards before the backward: the repeated layer must use the first one's prefix.
            return model(inputs_embeds=embeddings).last_hidden_state

        outputs = []
        for scale in (1.0, 0.5):
            if checkpointed and whole:
                outputs.append(checkpoint(run, scale * inputs, use_reentrant=reentrant))
            else:
                outputs.append(run(scale * inputs))
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        encoder = model.base_model.prefix_layer.encoder_of("default")
        gradients.append([inputs.grad, *(p.grad for p in encoder.parameters())])
    for ours, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
