"""The strength of a prefix: half the strength of a prefix is worth half of its copies."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import DynamicCache

from prefix_adapter import PeftModel, PrefixTuningV2Config, set_strength, use_strength
from prefix_adapter.backbone.masks import MaskSize, PrefixColumns, make_mask

KINDS = {
    "bert": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "gpt2": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "bart": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}


# Some softmaxes are computed in float32.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def build(kind="llama", attn=None, copies=1, **settings):
    """A model with a prefix of 3 tokens, repeated some times."""
    auto_class, task_type = KINDS[kind]
    config = PrefixTuningV2Config(task_type=task_type, num_virtual_tokens=3 * copies, **settings)
    base = tiny.model(kind, auto_class, attn=attn)
    for name, parameter in base.named_parameters():
        if "relative_attention_bias" in name:  # T5's scores depend on the positions of the copies
            parameter.data.zero_()
    model = get_peft_model(base, config).eval()
    weight = model.base_model.prefix_layer.encoder_of("default").embedding.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight.copy_(torch.randn(3, weight.shape[1], generator=generator).repeat(copies, 1))
    return model.double()


def inputs_of(kind="llama", rows=3, padding=None):
    """A batch; `padding` is the side of padding tokens in its second row."""
    inputs = {"input_ids": tiny.ids(rows, 7), "attention_mask": torch.ones(rows, 7, dtype=torch.long)}
    if padding:
        inputs["attention_mask"][1, slice(4, None) if padding == "right" else slice(0, 3)] = 0
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = tiny.ids(rows, 5, seed=9)
    return inputs


def base_of(model):
    """The model without its adapter."""
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_copies_at_half_the_strength_are_one_at_full_strength(kind, attn, padding):
    """exp(score + log(1/2)), twice, is exp(score)."""
    inputs = inputs_of(kind, padding=padding)
    expected = build(kind, attn)(**inputs).logits
    model = build(kind, attn, copies=2)
    assert (model(**inputs).logits - expected).abs().max() > 1e-3
    with use_strength(model, 0.5):
        torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_base_model_bit_for_bit(kind):
    model, inputs = build(kind, shift_positions=kind == "llama"), inputs_of(kind, padding="right")
    base = base_of(model)
    with use_strength(model, 0):
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, rtol=0, atol=0)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_rows_have_strengths_of_their_own():
    model, inputs = build(), inputs_of(rows=4, padding="left")
    strengths = [0.0, 0.5, 1.0, 3.0]
    with use_strength(model, strengths):
        together = model(**inputs).logits
    for row, strength in enumerate(strengths):
        with use_strength(model, strength):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        torch.testing.assert_close(together[row : row + 1], alone)


def test_strengths_beside_adapter_names():
    model, inputs = build(), inputs_of()
    model.add_adapter("other", PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5, init_std=1.0))
    model.eval().double()
    with use_strength(model, [0.5, 1.0, 1.0]):
        together = model(**inputs, adapter_names=["other", "__base__", "default"]).logits
    set_strength(model, 0.5, "other")
    torch.testing.assert_close(together, model(**inputs, adapter_names=["other", "__base__", "default"]).logits)
    model.set_adapter("other")
    torch.testing.assert_close(together[:1], model(**{name: value[:1] for name, value in inputs.items()}).logits)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate(settings):
    """A prefix of two copies at half the strength writes what one writes, in each row of a mixed batch too."""
    inputs, settings = inputs_of(padding="left"), {"max_new_tokens": 6, "do_sample": False, **settings}
    expected = build().generate(**inputs, **settings)
    model = build(copies=2)
    with use_strength(model, 0.5):
        assert torch.equal(model.generate(**inputs, **settings), expected)
    base = base_of(model).generate(**inputs, **settings)
    with use_strength(model, [0.5, 0.0, 0.5]):
        mixed = model.generate(**inputs, **settings)
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(base, expected)


def test_tokens_behind_a_cache():
    model, ids = build(copies=2), tiny.ids(2, 8)
    expected, cache = build()(input_ids=ids).logits, DynamicCache()
    with use_strength(model, 0.5):
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected[:, 6:], **FLOAT32)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_strength_of_the_attention_entry(kind):
    inputs = inputs_of(kind, padding="right")
    expected = build(kind, entry_point="attention")(**inputs).logits
    model = build(kind, copies=2, entry_point="attention")
    with use_strength(model, 0.5):
        torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32)


def test_training_at_another_strength():
    """The gradient of one copy at full strength is the sum of those of two copies at half the strength."""
    inputs, one, two = inputs_of(), build(), build(copies=2)
    one(**inputs, labels=inputs["input_ids"]).loss.backward()
    with use_strength(two, 0.5):
        two(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [m.base_model.prefix_layer.encoder_of("default").embedding.weight.grad for m in (one, two)]
    torch.testing.assert_close(gradients[1][:3] + gradients[1][3:], gradients[0])


def test_strength_is_saved_and_loaded(tmp_path):
    model, inputs = build(), inputs_of()
    set_strength(model, 0.25)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(model), tmp_path)
    assert loaded.peft_config["default"].strength == 0.25
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    set_strength(loaded, 1)
    torch.testing.assert_close(loaded(**inputs).logits, build()(**inputs).logits)


@pytest.mark.slow
def test_compiled():
    model, inputs = build(), inputs_of()
    compiled = torch.compile(model, backend="eager")
    for strength in (1.0, 0.5, 0.0, 0.25):
        set_strength(model, strength)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    with use_strength(model, 3.0):
        expected = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, expected)
    with use_strength(model, [3.0, 0.0, 0.5]):
        expected = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, expected)


@pytest.mark.parametrize("strength", [-0.1, 1001, float("nan"), "1", True])
def test_invalid_strength(strength):
    model = build()
    with pytest.raises(ValueError, match="strength"):
        set_strength(model, strength)
    with pytest.raises(ValueError, match="strength"), use_strength(model, [1.0, strength, 1.0]):
        pass
    with pytest.raises(ValueError, match="strength"):
        PrefixTuningV2Config(strength=strength)


def test_wrong_number_of_rows():
    model = build()
    with use_strength(model, [0.5, 1.0]):
        with pytest.raises(ValueError, match="`use_strength` has 2 numbers for a batch of 3"):
            model(**inputs_of())
        with pytest.raises(ValueError, match="`adapter_names` has 3 names, and `use_strength` has 2 numbers"):
            model(**inputs_of(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="empty list"), use_strength(model, []):
        pass


def test_no_such_adapter():
    with pytest.raises(ValueError, match="no prefix adapter 'other'; there are \\['default'\\]"):
        set_strength(build(), 0.5, "other")
    with pytest.raises(ValueError, match="no prefix adapter; there are \\[\\]"), use_strength(tiny.model("bert"), 0.5):
        pass


def test_flash_attention_has_no_place_for_it():
    model = build()
    model.base_model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="Flash attention has no place for the strength of a prefix"):
        set_strength(model, 0.5)
    assert model.peft_config["default"].strength == 1
    set_strength(model, 0)


def test_a_mask_has_a_row_for_each_row_of_the_batch():
    """LED and MVP compare the shape of a mask with that of the scores."""
    bias = torch.zeros(1, 1, 3)
    for queries, past in ((1, None), (4, None), (4, 0)):
        size = MaskSize(2, queries, 4, past, 0, bias.device, bias.dtype)
        assert make_mask(size, "sdpa", PrefixColumns(3, bias=bias)).shape == (2, 1, queries, 7)


@pytest.mark.parametrize("grad", [True, False])
def test_a_context_around_many_forwards_sees_what_the_optimizer_writes(grad):
    """The base model is called itself, so that the context is the only call around the forwards."""
    model = build("bert", prefix_dropout=0.0, lora_r=2)
    base, inputs = model.base_model.model, inputs_of("bert")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    with use_strength(model, [0.0, 0.5, 1.0]):
        for _ in range(3):
            with torch.set_grad_enabled(grad):
                inside = base(**inputs).logits
            with torch.no_grad(), use_strength(model, [0.0, 0.5, 1.0]):
                torch.testing.assert_close(inside, base(**inputs).logits)
            base(**inputs).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
