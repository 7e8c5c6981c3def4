"""`num_frozen_tokens`: the first virtual tokens of a table that training leaves alone."""

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from prefix_adapter import PeftModel, PrefixTuningV2Config, init_from, init_from_text
from prefix_adapter.backbone.filled_cache import fill_cache

CAUSAL = "AutoModelForCausalLM"
TEXT = [7, 40, 11, 93, 8, 62]
FROZEN = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_frozen.weight"
TRAINED = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight"


def wrap(frozen=2, name="default", dtype=None, **settings):
    base = tiny.model("llama", CAUSAL)
    if dtype is not None:
        base.to(dtype)
    config = PrefixTuningV2Config(num_virtual_tokens=6, num_frozen_tokens=frozen, prefix_dropout=0.0, **settings)
    return get_peft_model(base, config, adapter_name=name)


def table_of(model, name="default"):
    return model.base_model.prefix_layer.encoder_of(name).fold()


def step(model, optimizer, **kwargs):
    ids = tiny.ids()
    model.train()(input_ids=ids, labels=ids, **kwargs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_training_leaves_them_alone_under_weight_decay_and_whatever_peft_switches():
    model = wrap()
    init_from_text(model, TEXT)
    before = table_of(model)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        step(model, optimizer)
    after = table_of(model)
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).all()


def test_the_gradient_of_the_others_is_that_of_a_whole_table():
    whole, part = wrap(frozen=0), wrap(frozen=2)
    for model in (whole, part):
        init_from_text(model, TEXT)
        ids = tiny.ids()
        model(input_ids=ids, labels=ids).loss.backward()
    expected = whole.base_model.prefix_layer.encoder_of("default").embedding.weight.grad[2:]
    torch.testing.assert_close(part.base_model.prefix_layer.encoder_of("default").embedding.weight.grad, expected)


@torch.no_grad()
def test_the_outputs_are_those_of_keys_and_values_in_a_cache():
    model = wrap(shift_positions=True).eval()
    init_from_text(model, TEXT)
    tiny.randomize(model)
    layer, ids = model.base_model.prefix_layer, tiny.ids(1)
    encoder = layer.encoder_of("default")
    rows = torch.cat([encoder.frozen.weight, encoder.embedding.weight])
    filled = {
        slot.layer: slot.shape.split(rows[None, :, columns])
        for slot, columns in layer.adapters["default"].columns.items()
    }
    base = tiny.model("llama", CAUSAL)
    expected = base(input_ids=ids, past_key_values=fill_cache(filled), position_ids=torch.arange(6, 13)[None]).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    # A write to a frozen row is seen, although its keys and values were cached.
    encoder.frozen.weight.mul_(-3)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage):
    model = wrap().eval()
    init_from_text(model, TEXT)
    tiny.randomize(model)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: len(tensor) for name, tensor in saved.items()} == {FROZEN: 2, TRAINED: 4}
    loaded = PeftModel.from_pretrained(
        tiny.model("llama", CAUSAL), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(table_of(loaded), table_of(model))
    ids = tiny.ids()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_mixed_and_started_from_another_adapter():
    model = wrap().eval()
    init_from_text(model, TEXT)
    for name, frozen in (("whole", 0), ("one", 1)):
        model.add_adapter(name, PrefixTuningV2Config(num_virtual_tokens=6, num_frozen_tokens=frozen))
        init_from(model, "default", name)
        assert torch.equal(table_of(model, name), table_of(model))
    model.eval()
    ids = tiny.ids(1).expand(3, -1)
    rows = model(input_ids=ids, adapter_names=["default", "whole", "one"]).logits
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1, -1))


def test_their_dtype_is_that_of_the_table(tmp_path):
    model = wrap(dtype=torch.bfloat16)
    encoder = model.base_model.prefix_layer.encoder_of("default")
    assert encoder.frozen.weight.dtype == encoder.embedding.weight.dtype == torch.float32
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frozen_tokens": 6}, "nothing would be trained"),
        ({"num_frozen_tokens": -1}, "num_frozen_tokens"),
        ({"num_frozen_tokens": True}, "num_frozen_tokens"),
        ({"num_frozen_tokens": 1, "prefix_projection": True}, "prefix_projection=False"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuningV2Config(num_virtual_tokens=6, **settings)
