"""A layer that did not receive its prefix is an error that names the layer."""

import copy
import types

import pytest
import tiny
import torch
import transformers as tr

from prefix_adapter import PrefixNotUsedError, PrefixTuningV2Config, get_peft_model
from prefix_adapter.backbone.attention import AttentionTarget, PrefixSlot
from prefix_adapter.backbone.key_values import KeyValueShape


def wrapped(kind="bert", auto_class="AutoModel", config=None, **changes):
    model = get_peft_model(tiny.model(kind, auto_class, **changes), PrefixTuningV2Config(**(config or {}))).eval()
    tiny.randomize(model)
    return model


def test_an_attention_that_stops_using_its_cache():
    """A monkey patch, a kernel or a new release of a model may do this."""
    model = wrapped()
    attention = model.base_model.model.encoder.layer[1].attention.self

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return type(self).forward(self, hidden_states)

    attention.forward = types.MethodType(forward, attention)
    with pytest.raises(PrefixNotUsedError, match=r"encoder\.layer\.1\.attention\.self \(BertSelfAttention\)"):
        model(input_ids=tiny.ids())
    with model.disable_adapter():
        model(input_ids=tiny.ids())
    del attention.forward
    model(input_ids=tiny.ids())


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_modules_that_were_replaced_after_wrapping(layers):
    model = wrapped()
    for index in layers:
        attention = model.base_model.model.encoder.layer[index].attention
        fresh = tiny.model("bert").encoder.layer[index].attention.self
        attention.self = fresh
    with pytest.raises(PrefixNotUsedError, match=rf"encoder\.layer\.{layers[0]}\.attention\.self.*Wrap the model"):
        model(input_ids=tiny.ids())


def test_layers_without_a_prefix_are_not_missed():
    model = wrapped(config={"layers_to_transform": [2]})
    attention = model.base_model.model.encoder.layer[0].attention
    attention.self = copy.deepcopy(tiny.model("bert").encoder.layer[0].attention.self)
    model(input_ids=tiny.ids())


def test_layer_drop_is_no_error():
    model = wrapped("bart", encoder_layerdrop=0.5, decoder_layerdrop=0.5).train()
    for seed in range(5):
        torch.manual_seed(seed)
        model(input_ids=tiny.ids())


@pytest.mark.parametrize("kinds", [["encoder"], ["cross"], ["encoder", "decoder"], None])
def test_encoder_need_not_run_if_its_states_are_given(kinds):
    """`generate` runs the encoder alone, once."""
    model = wrapped("t5", "AutoModelForSeq2SeqLM", {"target_attention": kinds})
    ids = tiny.ids()
    whole = model(input_ids=ids, decoder_input_ids=ids)
    states = model.get_encoder()(input_ids=ids)
    again = model(encoder_outputs=states, decoder_input_ids=ids)
    assert torch.equal(again.logits, whole.logits)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids, decoder_input_ids=ids).logits, whole.logits, atol=1e-2)


def test_a_failed_forward_does_not_blame_the_next():
    model = wrapped()
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions.*Truncate the input to 64"):
        model(input_ids=tiny.ids(length=tiny.LENGTH + 1))
    model(input_ids=tiny.ids(length=tiny.LENGTH))


def test_bart_counts_positions_of_both_sides():
    model = wrapped("bart")
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions"):
        model(input_ids=tiny.ids(), decoder_input_ids=tiny.ids(length=tiny.LENGTH + 1))


@pytest.mark.parametrize("shift", [False, True])
def test_padding_needs_no_positions_where_the_backbone_gives_it_none(shift):
    """RoBERTa's positions count real tokens only, so a longer row may have 64 of them, with a shift fewer."""
    model = wrapped("roberta", config={"shift_positions": shift})
    most = tiny.LENGTH - (20 if shift else 0)
    ids = torch.nn.functional.pad(tiny.ids(length=most), (0, 9), value=model.config.pad_token_id)
    mask = (ids != model.config.pad_token_id).long()
    padded = model(input_ids=ids, attention_mask=mask)[0][:, :most]
    torch.testing.assert_close(padded, model(input_ids=ids[:, :most])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=rf"{most + 1} tokens.*Truncate the input to {most}"):
        model(input_ids=tiny.ids(length=most + 1))


def test_gradients_that_reentrant_checkpointing_would_lose_are_refused():
    """In Gemma 3n later layers reuse keys and values that gradient checkpointing does not track."""
    config = tr.Gemma3nTextConfig(
        vocab_size=99, vocab_size_per_layer_input=99, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
        laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"Layers \[2, 3\].*shared attention"):
        model = get_peft_model(tr.Gemma3nForCausalLM(config), PrefixTuningV2Config()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r'"use_reentrant": False'):
        model(input_ids=tiny.ids())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()


@pytest.mark.parametrize("positions", [False, True])
def test_a_prefix_stands_before_the_first_token_and_not_before_its_padding(positions):
    """With rotary embeddings, left padding needs no `position_ids`. With a shifting prefix it does."""
    model = wrapped("llama", "AutoModelForCausalLM")
    ids, padding = tiny.ids(), torch.tensor([0, 3])
    rows = [torch.nn.functional.pad(row, (int(p), 3 - int(p)), value=7) for row, p in zip(ids, padding, strict=True)]
    mask = torch.stack([(torch.arange(10) >= p) & (torch.arange(10) < p + 7) for p in padding]).long()
    inputs = {"input_ids": torch.stack(rows), "attention_mask": mask}
    if positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together, alone = model(**inputs).logits, model(input_ids=ids).logits
        for row, p in enumerate(padding):
            torch.testing.assert_close(together[row, p : p + 7], alone[row], atol=1e-5, rtol=1e-4)
        # A mask over a cache and the following tokens.
        first = model(input_ids=inputs["input_ids"][:, :5], attention_mask=mask[:, :5], use_cache=True)
        rest = {"input_ids": inputs["input_ids"][:, 5:], "past_key_values": first.past_key_values}
        again = model(**rest, attention_mask=mask).logits
    torch.testing.assert_close(again[1, 0:5], alone[1, 2:], atol=1e-5, rtol=1e-4)


def test_computed_positions_that_are_added_stay_the_backbones_own():
    """XGLM's sinusoids are no table, but unlike rotary embeddings they depend on where a row starts."""
    config = tr.XGLMConfig(vocab_size=99, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    torch.manual_seed(0)
    model = get_peft_model(tr.XGLMForCausalLM(config), PrefixTuningV2Config(task_type="CAUSAL_LM")).eval()
    ids, mask, seen = tiny.ids(), torch.ones(2, 7, dtype=torch.long), []
    mask[0, :3] = 0
    positions = model.base_model.model.model.embed_positions
    positions.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        with model.disable_adapter():
            model(input_ids=ids, attention_mask=mask)
    assert torch.equal(*seen)


def test_self_speculative_generation():
    """With `assistant_early_exit` the model leaves out its last layers, which is no error."""
    model = wrapped("llama", "AutoModelForCausalLM", {"task_type": "CAUSAL_LM"})
    ids = tiny.ids(1)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    greedy = model.generate(input_ids=ids, **settings)
    for layers in (1, 2):
        assert torch.equal(model.generate(input_ids=ids, assistant_early_exit=layers, **settings), greedy)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **settings), greedy)
    # Other layers that are left out are an error.
    layer = model.base_model.model.model.layers[2]
    layer.self_attn = copy.deepcopy(tiny.model("llama").layers[2].self_attn)
    with pytest.raises(PrefixNotUsedError, match=r"model\.layers\.2\.self_attn"):
        model(input_ids=ids)


def test_a_stack_is_named_without_the_numbers_of_layers():
    """A number within the name of a part, as in "vjepa2", is not the number of a layer."""
    slot = PrefixSlot("encoder", 0, KeyValueShape(1, 1, 1, 1))
    for name, stack in (
        ("vjepa2.encoder.layer.0.attention", "vjepa2.encoder.layer"),
        ("vjepa2.predictor.layer.11.attention", "vjepa2.predictor.layer"),
        ("0.self", ""),
        ("layers.3", "layers"),
    ):
        target = AttentionTarget(name, torch.nn.Identity(), [], "", False, {None: slot})
        assert target.stack == f"{stack} (encoder attention)"
