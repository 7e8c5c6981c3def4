"""Assisted generation and quantized caches: the text is that of greedy decoding with the plain backbone."""

import pytest
import tiny
import torch
from plain import N, decoder, logits, table_of

from prefix_adapter import PrefixTuningV2Config, get_peft_model

NEW = 8


def wrapped(seed=0):
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=N)
    model = get_peft_model(decoder(seed), config).eval()
    tiny.randomize(model)
    return model


@torch.no_grad()
def greedy(base, row, table):
    """Greedy decoding without a cache of the tokens."""
    for _ in range(NEW):
        row = torch.cat([row, logits(base, row, table)[-1].argmax()[None]])
    return row


def generate(model, ids, **options):
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **options)


@pytest.mark.parametrize("who", ["plain", "wrapped", "unlike"])
def test_assisted_generation(who):
    """The assistant proposes tokens; it may have a prefix of its own. What it proposes must not matter."""
    model, row = wrapped(), tiny.ids(1)
    assistant = {"plain": decoder, "wrapped": wrapped, "unlike": lambda: wrapped(seed=7)}[who]()
    expected = greedy(decoder(), row[0], table_of(model))
    assert torch.equal(generate(model, row, assistant_model=assistant)[0], expected)
    assert not torch.equal(expected, greedy(decoder(), row[0], None))


@pytest.mark.parametrize("rows", [1, 2])
def test_quantized_cache(rows):
    """The cache rounds keys and values of old tokens. The prefix is not in it, and 8 bits change no token here."""
    pytest.importorskip("hqq", reason="needs the `works-with` extra")
    model, ids = wrapped(), tiny.ids(rows)
    config = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "residual_length": 4, "q_group_size": 8}
    found = generate(model, ids, cache_implementation="quantized", cache_config=config)
    for row, each in zip(ids, found, strict=True):
        assert torch.equal(each, greedy(decoder(), row, table_of(model)))
        assert not torch.equal(each, greedy(decoder(), row, None))
