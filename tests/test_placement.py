"""Quantised backbones, and backbones that are spread over several places."""

import pytest
import tiny
import torch
import transformers as tr
from accelerate import cpu_offload, dispatch_model
from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

TOKENS = 4


@pytest.fixture
def folder(tmp_path):
    """A saved Llama whose matrices are large enough for the quantisers' blocks."""
    torch.manual_seed(0)
    config = tiny.config("llama", hidden_size=128, num_key_value_heads=2, head_dim=32, intermediate_size=128)
    tr.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bit():
    pytest.importorskip("bitsandbytes")
    return tr.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return tr.BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return tr.TorchAoConfig(Int8WeightOnlyConfig())


# bitsandbytes' 8-bit products quantise the inputs too, so a token's result depends a little on the batch.
QUANTISED = {"4bit": (four_bit, 1e-4), "8bit": (eight_bit, 0.1), "torchao-int8": (torchao_int8, 1e-4)}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_backbone(kind, folder, tmp_path):
    """[prefix; x] in one pass, on the quantised model itself; saving; generation."""
    make, tolerance = QUANTISED[kind]

    def load():
        return tr.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=make(), device_map="cpu", dtype=torch.float32
        ).eval()

    base, front, x = load(), tiny.ids(1, TOKENS, seed=5), tiny.ids(1, 6)
    kinds = {type(base.model.layers[0].self_attn.q_proj).__name__, type(base.model.layers[0].self_attn.q_proj.weight)}
    assert kinds != {"Linear", torch.nn.Parameter}, "the backbone is not quantised"
    with torch.no_grad():
        stored = base(front, use_cache=True).past_key_values
        want = base(torch.cat([front, x], 1)).logits[:, TOKENS:]
        alone = base(x).logits
    config = PrefixTuningV2Config(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, shift_positions=True, prefix_dropout=0.0
    )
    model = get_peft_model(base, config).eval()
    table = base.prefix_tuning_v2.prefix_tuning_v2_embedding["default"].weight
    assert table.dtype == torch.float32
    with torch.no_grad():
        parts = [t[0].transpose(0, 1).flatten(1) for layer in stored.layers for t in (layer.keys, layer.values)]
        table.copy_(torch.cat(parts, dim=1))
        ours = model(x).logits
    scale = want.abs().max()
    assert (ours - want).abs().max() < tolerance * scale < (alone - want).abs().max()
    tokens = model.generate(input_ids=x, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 10)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, ours)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_backbone_passes_gradients_on(kind, folder):
    """bitsandbytes repacks 4-bit weights at the first evaluation on a CPU, for good: wrapping must be none."""
    model = tr.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTISED[kind][0](), device_map="cpu", dtype=torch.float32
    )
    model = get_peft_model(model, PrefixTuningV2Config(num_virtual_tokens=TOKENS, prefix_dropout=0.0)).train()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    gradient = model.base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding["default"].weight.grad
    assert gradient is not None and (gradient != 0).all()


@pytest.mark.parametrize("projection", [False, True])
def test_a_dispatched_backbone(projection, folder, tmp_path):
    """Accelerate's hooks move weights and inputs of each layer, here from and to the disk, around ours."""

    def load():
        return tr.AutoModelForCausalLM.from_pretrained(folder).eval()

    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=projection)
    whole = get_peft_model(load(), config).eval()
    tiny.randomize(whole)
    whole.save_pretrained(tmp_path / "adapter")
    x = tiny.ids()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = dispatch_model(load(), places, offload_dir=str(tmp_path / "offload"), main_device="cpu")
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta, "nothing is offloaded"
    model = PeftModel.from_pretrained(spread, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, whole(x).logits, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            assert (model(x).logits - whole(x).logits).abs().max() > 0.1
    assert torch.equal(
        model.generate(input_ids=x, max_new_tokens=4, do_sample=False),
        whole.generate(input_ids=x, max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("projection", [False, True])
def test_a_backbone_that_is_offloaded_as_a_whole(projection):
    """All weights are on the meta device between two calls. The prefix is not, and is trained."""
    config = PrefixTuningV2Config(num_virtual_tokens=TOKENS, prefix_projection=projection, prefix_dropout=0.0)
    whole, base = get_peft_model(tiny.model("llama"), config), tiny.model("llama")
    cpu_offload(base, torch.device("cpu"))
    model = get_peft_model(base, config)
    tiny.randomize(whole), tiny.randomize(model)
    x, trained = tiny.ids(), [p for p in model.parameters() if p.requires_grad]
    states, expected_states = (each(input_ids=x).last_hidden_state for each in (model, whole))
    torch.testing.assert_close(states, expected_states, atol=1e-5, rtol=1e-5)
    states.sum().backward(), expected_states.sum().backward()
    expected = [p.grad for p in whole.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_backbone_that_transformers_has_put_on_the_disk(folder, tmp_path):
    """PEFT takes the hooks off, whatever the method: the error says so, and what it advises works."""

    def load():
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
        return tr.AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    adapter, x = tmp_path / "adapter", tiny.ids()
    whole = get_peft_model(
        tr.AutoModelForCausalLM.from_pretrained(folder),
        PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    )
    tiny.randomize(whole)
    whole.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"are offloaded to the disk.*get_peft_model\(base") as error:
        PeftModel.from_pretrained(load(), adapter)
    assert "cannot take a prefix" not in str(error.value)
    model = get_peft_model(load(), PrefixTuningV2Config.from_pretrained(adapter))
    set_peft_model_state_dict(model, load_peft_weights(adapter))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x).logits, whole.eval()(x).logits, atol=1e-5, rtol=1e-5)
