"""Virtual tokens to keys and values: plain tensors."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.encoder import KeyValueShape, PrefixEncoder, prepend

SHAPE = KeyValueShape(key_heads=2, key_size=3, value_heads=1, value_size=4)


def test_columns_are_in_the_order_of_the_reference():
    """Keys before values, heads, head size: what `view(n, 2, heads, size)` gives where both are alike."""
    prefix = torch.arange(2 * 5 * 10.0).view(2, 5, 10)
    keys, values = SHAPE.split(prefix)
    assert keys.shape == (2, 2, 5, 3) and values.shape == (2, 1, 5, 4)
    for row, token in ((0, 0), (1, 4)):
        flat = torch.cat([keys[row, :, token].flatten(), values[row, :, token].flatten()])
        assert torch.equal(flat, prefix[row, token])


def test_join_puts_the_prefix_in_front_in_the_type_of_what_is_there():
    prefix = torch.randn(1, 5, 10)
    keys, values = torch.randn(3, 2, 7, 3).bfloat16(), torch.randn(3, 1, 7, 4).bfloat16()
    joined_keys, joined_values = prepend(SHAPE.split(prefix), keys, values)
    assert joined_keys.shape == (3, 2, 12, 3) and joined_values.dtype == torch.bfloat16
    assert torch.equal(joined_keys[:, :, 5:], keys) and torch.equal(joined_values[:, :, 5:], values)
    assert torch.equal(joined_keys[2, 1, 4], prefix[0, 4, 3:6].bfloat16())
    shared = KeyValueShape(2, 3, 0, 0)
    one, other = prepend(shared.split(torch.randn(1, 5, 6)), keys, keys)
    assert one is other and one.shape == (3, 2, 12, 3)


@pytest.mark.parametrize("width", [None, 6])
def test_an_encoder_computes_columns_as_it_computes_all_of_them(width):
    encoder = PrefixEncoder.new(length=5, columns=24, std=0.3, hidden_size=8, width=width)
    table = encoder.fold()
    assert table.shape == (5, 24)
    for start, stop in ((0, 10), (10, 24)):
        torch.testing.assert_close(encoder.encode(slice(start, stop)), table[:, start:stop])
    if width:
        by_hand = torch.tanh(encoder.embedding.weight @ encoder.hidden.weight.T + encoder.hidden.bias)
        torch.testing.assert_close(table, by_hand @ encoder.output.weight.T + encoder.output.bias)
        assert not encoder.hidden.bias.any() and not encoder.output.bias.any()


def test_the_mlp_costs_n_rows_whatever_the_batch():
    """Promise 8: PEFT and the reference run it on every row of the batch."""

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
    # Each layer computes the first matrix anew, and its own columns of the last.
    assert extra(1) == extra(16) == 2 * 6 * hidden * (tiny.LAYERS * hidden + columns)
