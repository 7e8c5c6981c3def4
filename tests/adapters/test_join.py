"""Saved prefixes side by side in one: held against keys and values in a cache, and against PEFT's CARTRIDGE."""

import dataclasses

import pytest
import tiny
import torch
from peft import PeftConfig, compose_cartridge_adapters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefix_adapter import PeftModel, PrefixTuningV2Config, export_peft, get_peft_model, import_peft, join
from prefix_adapter.adapters.join import _MAY_DIFFER
from prefix_adapter.backbone.filled_cache import fill_cache
from prefix_adapter.cli import main

CAUSAL = "AutoModelForCausalLM"
KEY = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight"
MLP = {"prefix_projection": True, "encoder_hidden_size": 8}


@pytest.fixture
def base(tmp_path):
    tiny.model("llama", CAUSAL).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def save(folder, base, seed, n=3, **settings):
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=n, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    tiny.randomize(model, seed=seed)
    model.save_pretrained(str(folder))
    layer = model.base_model.prefix_layer
    table = layer.encoder_of("default").fold()
    return {
        slot.layer: slot.shape.split(table[None, :, columns])
        for slot, columns in layer.adapters["default"].columns.items()
    }


@pytest.mark.parametrize("settings", [{}, {"shift_positions": True}, MLP])
@torch.no_grad()
def test_the_model_sees_both(base, tmp_path, settings):
    one, other = (save(tmp_path / name, base, seed, n, **settings) for name, seed, n in (("a", 2, 3), ("b", 3, 5)))
    main(["join", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "both")])
    model = PeftModel.from_pretrained(tiny.model("llama", CAUSAL), str(tmp_path / "both")).eval()
    assert model.peft_config["default"].num_virtual_tokens == 8
    ids = tiny.ids(1)
    found = model(input_ids=ids).logits
    cache = {layer: tuple(torch.cat(pair, 2) for pair in zip(one[layer], other[layer], strict=True)) for layer in one}
    positions = torch.arange(ids.shape[1])[None] + (8 if "shift_positions" in settings else 0)
    base_model = tiny.model("llama", CAUSAL)
    expected = base_model(input_ids=ids, past_key_values=fill_cache(cache), position_ids=positions).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, base_model(input_ids=ids).logits, atol=1e-2)

    active = PeftModel.from_pretrained(tiny.model("llama", CAUSAL), str(tmp_path / "a"), "a").eval()
    active.load_adapter(str(tmp_path / "b"), "b")
    active.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(active.eval()(input_ids=ids).logits, found, atol=1e-5, rtol=1e-5)


def test_as_peft_joins_cartridges(base, tmp_path):
    names = ("a", "b")
    for seed, name in enumerate(names, start=2):
        save(tmp_path / name, base, seed, shift_positions=True, num_frozen_tokens=1, prefix_dropout=0.0)
        export_peft(tmp_path / name, tmp_path / f"peft-{name}", peft_type="CARTRIDGE")
    compose_cartridge_adapters([tmp_path / f"peft-{name}" for name in names], output_path=tmp_path / "peft-both")
    import_peft(tmp_path / "peft-both", tmp_path / "theirs")
    join([tmp_path / name for name in names], tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and len(ours[KEY]) == 5
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert PeftConfig.from_pretrained(tmp_path / "ours").num_frozen_tokens == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"shift_positions": True}, "b has `shift_positions=True`"),
        ({"strength": 0.5}, "b has `strength=0.5`"),
        ({"layers_to_transform": [0]}, r"b has `layers_to_transform=\[0\]`"),
        ({"lora_r": 1}, r"b has more than a prefix \(`lora_r=1`\)"),
        ({"modules_to_save": ["lm_head"]}, "b has more than a prefix .*lm_head"),
    ],
)
def test_refused(base, tmp_path, settings, why):
    save(tmp_path / "a", base, 2)
    save(tmp_path / "b", base, 3, **settings)
    with pytest.raises(ValueError, match=why):
        join([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_new_setting_is_compared(base, tmp_path, monkeypatch):
    """A setting that `join` does not know could change what a prefix computes."""
    known = set(_MAY_DIFFER)
    assert known <= {field.name for field in dataclasses.fields(PrefixTuningV2Config)}
    monkeypatch.setattr("prefix_adapter.adapters.join._MAY_DIFFER", known - {"prefix_dropout"})
    save(tmp_path / "a", base, 2)
    save(tmp_path / "b", base, 3, prefix_dropout=0.3)
    with pytest.raises(ValueError, match=r"b has `prefix_dropout=0.3`, and .*a has None"):
        join([tmp_path / "a", tmp_path / "b"], tmp_path / "both")


def test_one_alone(base, tmp_path):
    with pytest.raises(ValueError, match="two adapters or more, got 1"):
        join([tmp_path / "a"], tmp_path / "both")
