"""`entry_point="attention"`: prefixes for attention that takes no cache.

The references are the cache as the other entry point, hooks on DeBERTa's projections, and one pass over [prefix; x]
whose keys and values a recording attention function of the test has taken.
"""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tr
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_adapter import (
    PeftModel,
    PrefixNotUsedError,
    PrefixTuningV2Config,
    UnsupportedBackboneError,
    get_peft_model,
)

N = 3
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "max_relative_positions": 16,
    "position_biased_input": False, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
CONFIGS = {
    "albert": tr.AlbertConfig(**SMALL, embedding_size=16),
    "albert, groups": tr.AlbertConfig(
        **{**SMALL, "num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2, inner_group_num=2
    ),
    "deberta-v2": tr.DebertaV2Config(**SMALL, **DEBERTA, share_att_key=True),
    "distilbert": tr.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.2, num_labels=3
    ),
    "modernbert": tr.ModernBertConfig(**SMALL, **MODERN, global_attn_every_n_layers=2),
}


def base(kind, auto_class="AutoModel", attn=None):
    torch.manual_seed(0)
    kwargs = {} if attn is None else {"attn_implementation": attn}
    model = getattr(tr, auto_class).from_config(copy.deepcopy(CONFIGS[kind]), **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def config(**changes):
    settings = {"num_virtual_tokens": N, "prefix_dropout": 0.0, "init_std": 1.0, "entry_point": "attention"}
    return PrefixTuningV2Config(**{**settings, **changes})


def padded():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tiny.ids(), "attention_mask": mask}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_equals_the_cache_where_there_is_one(kind, attn):
    results = {}
    for entry_point in ("cache", "attention"):
        torch.manual_seed(1)
        model = get_peft_model(tiny.model(kind, attn=attn), config(entry_point=entry_point)).eval()
        table = model.base_model.prefix_layer.encoder_of("default").embedding.weight
        output = model(**padded())[0]
        output.square().sum().backward()
        results[entry_point] = table.detach(), output.detach(), table.grad
    for ours, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_generate_equals_the_cache():
    results = []
    for entry_point in ("cache", "attention"):
        torch.manual_seed(1)
        model = get_peft_model(tiny.model("llama", "AutoModelForCausalLM"), config(entry_point=entry_point)).eval()
        inputs = {"input_ids": tiny.ids(), "adapter_names": ["default", "__base__"]}
        results.append(model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True))
    assert torch.equal(*results)


def record_keys(model, **inputs):
    """Keys and values of each layer, taken by an attention function of this test."""
    taken = []

    def recording(module, query, key, value, mask, **kwargs):
        taken.append((key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    tr.AttentionInterface.register("recording", recording)
    tr.AttentionMaskInterface.register("recording", tr.masking_utils.sdpa_mask)
    model.set_attn_implementation("recording")
    output = model(**inputs)[0]
    model.set_attn_implementation("sdpa")
    return taken, output


def test_modernbert_equals_one_pass_over_prefix_and_input():
    """With real keys and values of p as the prefix, x gets the outputs that it has behind p in one pass.

    In the one pass p does not see x, and x sees p through every window.
    """
    model, ids = base("modernbert", attn="sdpa"), tiny.ids(1, N + 12)
    full = torch.ones(1, 1, N + 12, N + 12, dtype=torch.bool)
    full[..., :N, N:] = False
    distance = torch.arange(N + 12)[:, None] - torch.arange(N + 12)
    window = full & ((distance.abs() <= 4) | (torch.arange(N + 12) < N))
    masks = {"full_attention": full, "sliding_attention": window}
    with torch.no_grad():
        taken, expected = record_keys(model, input_ids=ids, attention_mask=masks)
        prompt = get_peft_model(model, config(shift_positions=True)).eval()
        layer = prompt.base_model.prefix_layer
        table = layer.encoder_of("default").embedding.weight
        for (slot, columns), pair in zip(layer.adapters["default"].columns.items(), taken, strict=True):
            parts = [side[0, :, :N].transpose(0, 1).flatten(1) for side in pair]
            assert slot.kind == "encoder"
            table[:, columns] = torch.cat(parts, 1)
        ours = prompt(input_ids=ids[:, N:])[0]
    torch.testing.assert_close(ours, expected[:, N:], atol=1e-5, rtol=1e-4)


def test_modernbert_sees_the_prefix_beyond_its_window():
    for layer in (0, 1):
        model = get_peft_model(base("modernbert"), config(layers_to_transform=[layer])).eval()
        ids = tiny.ids(1, 40)
        with torch.no_grad(), model.disable_adapter():
            without = model(input_ids=ids)[0]
        table = model.base_model.prefix_layer.encoder_of("default").embedding.weight
        output = model(input_ids=ids)[0]
        assert (output[0, -1] - without[0, -1]).abs().max() > 1e-2
        output[0, -1].sum().backward()
        assert table.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["albert", "albert, groups"])
def test_albert_has_a_prefix_for_each_pass(kind):
    """The same as with copies of the shared modules, one for each pass."""
    model = get_peft_model(base(kind), config()).eval()
    layer = model.base_model.prefix_layer
    passes = len(layer.adapters["default"].columns)
    shared = CONFIGS[kind]
    assert passes == shared.num_hidden_layers * shared.inner_group_num
    output = model(**padded())[0]
    # ALBERT with a group for each layer, each with the weights of the group that it repeats.
    unrolled_config = copy.deepcopy(shared)
    unrolled_config.num_hidden_groups = shared.num_hidden_layers
    unrolled = tr.AutoModel.from_config(unrolled_config).eval()
    weights = {name: value for name, value in base(kind).state_dict().items() if "layer_groups" not in name}
    groups = base(kind).encoder.albert_layer_groups
    for index in range(shared.num_hidden_layers):
        group = groups[index * shared.num_hidden_groups // shared.num_hidden_layers]
        own = {f"encoder.albert_layer_groups.{index}.{name}": value for name, value in group.state_dict().items()}
        weights.update(own)
    unrolled.load_state_dict(weights)
    reference = get_peft_model(unrolled, config()).eval()
    reference_layer = reference.base_model.prefix_layer
    assert all(len(target.slots) == 1 for target in reference_layer.targets)
    with torch.no_grad():
        reference_layer.encoder_of("default").embedding.weight.copy_(layer.encoder_of("default").embedding.weight)
    torch.testing.assert_close(output, reference(**padded())[0])


def test_albert_with_other_layers_than_when_wrapped():
    model = get_peft_model(base("albert"), config())
    model.base_model.model.config.num_hidden_layers = 3
    with pytest.raises(PrefixNotUsedError, match=r"serves 2 layers.*Call the whole model"):
        model(**padded())
    model.base_model.model.config.num_hidden_layers = 1
    with pytest.raises(PrefixNotUsedError, match=r"serves 2 layers.*was called 1 times"):
        model(**padded())


@pytest.mark.parametrize("share", [True, False])
def test_deberta_equals_hooks_on_its_projections(share):
    """A prefix in the outputs of key_proj and value_proj, with a bias of 0 and a mask that shows it."""
    model = base("deberta-v2")
    if not share:
        torch.manual_seed(0)
        model = tr.DebertaV2Model(tr.DebertaV2Config(**SMALL, **DEBERTA, share_att_key=False)).eval()
    wrapped = get_peft_model(copy.deepcopy(model), config()).eval()
    layer = wrapped.base_model.prefix_layer
    table = layer.encoder_of("default").embedding.weight.detach()
    columns = list(layer.adapters["default"].columns.values())
    for index, block in enumerate(model.encoder.layer):
        attention, (keys, values) = block.attention.self, table[:, columns[index]].chunk(2, 1)
        _hook_projections(attention, keys, values)
    torch.testing.assert_close(wrapped(**padded())[0], model(**padded())[0], atol=1e-5, rtol=1e-4)


def _hook_projections(attention, keys, values):
    on = [True]

    def in_front(prefix):
        def hook(module, args, output):
            return torch.cat([prefix.expand(len(output), -1, -1), output], 1) if on[0] else output

        return hook

    own_bias = attention.disentangled_attention_bias

    def bias(query, key, *args):
        on[0] = False
        result = F.pad(own_bias(query, key[:, N:], *args), (N, 0))
        on[0] = True
        return result

    def widen(module, args, kwargs):
        return (args[0], F.pad(args[1].expand(-1, -1, 7, -1), (N, 0), value=1), *args[2:]), kwargs

    attention.key_proj.register_forward_hook(in_front(keys))
    attention.value_proj.register_forward_hook(in_front(values))
    attention.disentangled_attention_bias = bias
    attention.register_forward_pre_hook(widen, with_kwargs=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_folded_loaded_and_taken_off(kind, tmp_path):
    model = get_peft_model(base(kind, "AutoModelForSequenceClassification"), config(prefix_projection=True)).eval()
    configs = [getattr(module, "config", None) for module in base(kind).modules()]
    with torch.no_grad():
        output = model(**padded()).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**padded()).logits, output)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(kind, "AutoModelForSequenceClassification"), tmp_path).eval()
        assert again.peft_config["default"].entry_point == "attention"
        assert torch.equal(again(**padded()).logits, output)
        again.base_model.prefix_layer.fold("default")
        torch.testing.assert_close(again(**padded()).logits, output)
        plain = again.unload()
    expected = base(kind, "AutoModelForSequenceClassification").requires_grad_(False)
    assert torch.equal(plain(**padded()).logits, expected(**padded()).logits)
    assert any(configs)
    for module in plain.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation in ("sdpa", "eager")
        assert not hasattr(module, "prefix_tuning_v2_function")


def test_the_attention_implementation_can_be_changed_later():
    model = get_peft_model(base("modernbert", attn="sdpa"), config()).eval()
    outputs = []
    for attn in ("sdpa", "eager"):
        model.base_model.model.set_attn_implementation(attn)
        outputs.append(model(**padded(), output_attentions=attn == "eager"))
    assert outputs[1].attentions[0].shape[-1] == 7 + N
    torch.testing.assert_close(outputs[0][0][0], outputs[1][0][0], atol=1e-5, rtol=1e-4)
    model.base_model.model.set_attn_implementation("flex_attention")
    # The backbone compiles flex attention's mask, which takes half a minute and is not what is tested.
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match="'flex_attention' is not supported"),
    ):
        model(**padded())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_error_for_the_cache_names_the_setting(kind):
    with pytest.raises(UnsupportedBackboneError, match=r'PrefixTuningV2Config\(entry_point="attention"\)'):
        get_peft_model(base(kind), config(entry_point="cache"))


def test_attention_that_uses_no_interface_is_refused():
    model = tr.XLNetModel(tr.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(UnsupportedBackboneError, match="compute attention themselves") as refusal:
        get_peft_model(model, config())
    assert "entry_point" not in str(refusal.value)
    # It also asks for the name of the implementation, in order to compute something else for "eager".
    with pytest.raises(UnsupportedBackboneError, match="use transformers' attention interface for a part of it"):
        get_peft_model(tiny.model("gpt2"), config())


def test_adapters_of_one_model_enter_at_one_point():
    model = get_peft_model(base("distilbert"), config())
    with pytest.raises(ValueError, match=r"'other' has `entry_point='cache'`.*Load the base model anew"):
        model.add_adapter("other", config(entry_point="cache"))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"`entry_point` must be one of \['cache', 'attention'\], got keys"):
        config(entry_point="keys")


def test_a_module_that_no_longer_calls_its_function():
    model = get_peft_model(base("distilbert"), config())
    attention = model.base_model.model.transformer.layer[1].attention
    attention.config = model.config
    with pytest.raises(PrefixNotUsedError, match=r"transformer\.layer\.1\.attention"):
        model(**padded())


def test_rows_of_a_batch_with_adapters_of_their_own():
    model = get_peft_model(base("albert"), config()).eval()
    model.add_adapter("longer", config(num_virtual_tokens=N + 2, layers_to_transform=[1]))
    inputs = {name: value[:1].repeat(3, 1) for name, value in padded().items()}
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "longer", "__base__"])[0]
        for row, name in enumerate(("default", "longer")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(**inputs)[0][row], atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], model(**inputs)[0][2], atol=1e-5, rtol=1e-4)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-2 < (mixed[1] - mixed[2]).abs().max()


def test_attention_beside_the_interface_is_named():
    """GIT's vision tower uses transformers' attention interface, and its text layers compute attention themselves."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    model = tr.GitForCausalLM(tr.GitConfig(**SMALL, vision_config=vision))
    with pytest.warns(UserWarning, match=r"layer\.0\.attention\.self, .* attention themselves and get no prefix"):
        wrapped = get_peft_model(model, config())
    names = [target.name for target in wrapped.base_model.prefix_layer.targets]
    assert len(names) == 2 and all("vision_model" in name for name in names)


def test_attention_to_something_else_than_tokens_gets_no_prefix():
    """A module that chooses among states of each token by the attention interface, as some decoders choose layers."""

    class Choice(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.num_key_value_groups, self.is_causal = config, 1, False

        def forward(self, states):
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            return function(self, states[:, :, :1], states, states, None)[0][:, 0]

    class Block(torch.nn.Module):
        def __init__(self, block, config):
            super().__init__()
            self.block, self.choice = block, Choice(config)

        def forward(self, states, *args, **kwargs):
            after = self.block(states, *args, **kwargs)
            return self.choice(torch.stack([states, after], 2))

    model = base("distilbert", attn="sdpa")
    model.transformer.layer[1] = Block(model.transformer.layer[1], model.config)
    wrapped = get_peft_model(model, config())
    assert len(wrapped.base_model.prefix_layer.targets) == 2
    assert not torch.allclose(wrapped(**padded())[0], wrapped.unload()(**padded())[0], atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_images(reentrant):
    sizes = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    images, gradients = torch.randn(2, 3, 16, 16), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vit = tr.ViTModel(tr.ViTConfig(**sizes, intermediate_size=48, image_size=16, patch_size=8))
        model = get_peft_model(vit, config()).train()
        if checkpointing:
            vit.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(pixel_values=images)[0].square().sum().backward()
        gradients.append(model.base_model.prefix_layer.encoder_of("default").embedding.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 0


@pytest.mark.parametrize("entry_point", ["cache", "attention"])
def test_encoder_states_by_keyword_in_reentrant_checkpointing(entry_point, monkeypatch):
    """Reentrant checkpointing loses the gradients of what a layer receives by keyword: that is an error."""
    layer_class = tr.models.bart.modeling_bart.BartDecoderLayer
    call = layer_class.__call__

    def call_by_keyword(self, hidden_states, attention_mask, encoder_hidden_states, **kwargs):
        return call(self, hidden_states, attention_mask, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(layer_class, "__call__", call_by_keyword)
    model = get_peft_model(tiny.model("bart"), config(entry_point=entry_point)).train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if not reentrant:
            model(input_ids=tiny.ids())[0].sum().backward()
            continue
        with pytest.raises(ValueError, match=r'encoder_hidden_states by keyword, .*"use_reentrant": False'):
            model(input_ids=tiny.ids())
        with torch.no_grad():
            model(input_ids=tiny.ids())
