"""Adapters that start from a text, as if it stood in front, or from another adapter."""

import json
import warnings

import pytest
import tiny
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from prefix_adapter import PeftModel, PrefixTuningV2Config, init_from, init_from_text
from prefix_adapter.prefix.values import PrefixValues

CAUSAL = "AutoModelForCausalLM"
TEXT = [7, 40, 11, 93, 8, 62]
SIZES = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "initializer_range": 0.2, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": tiny.LAYERS, "num_attention_heads": tiny.HEADS, "intermediate_size": 48}
MORE = {
    "opt": lambda: tr.OPTConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=tiny.LENGTH, word_embed_proj_dim=32, init_std=0.2, pad_token_id=0, eos_token_id=2,
    ),
    "bloom": lambda: tr.BloomConfig(n_layer=3, n_head=4, eos_token_id=2, **SIZES),
    "mistral": lambda: tr.MistralConfig(sliding_window=8, num_key_value_heads=2, **SIZES, **LAYERS),
    # Latent attention, with keys and values of different sizes.
    "deepseek_v3": lambda: tr.DeepseekV3Config(
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=3, num_key_value_heads=4, **SIZES,
        **LAYERS,
    ),
    "gptj": lambda: tr.GPTJConfig(
        vocab_size=tiny.VOCAB, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=tiny.LENGTH,
        initializer_range=0.2, pad_token_id=0, eos_token_id=2,
    ),
    "jamba": lambda: tr.JambaConfig(
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False,
        mamba_d_state=4, mamba_expand=2, **SIZES, **LAYERS,
    ),
}  # fmt: skip
# Every way to place tokens: computed rotary (the input's positions may stay), rotary and others from a table, ALiBi.
EXACT = [
    ("llama", True), ("llama", False), ("gpt2", True), ("opt", True), ("bloom", False), ("mistral", False),
    ("deepseek_v3", False), ("gptj", True),
]  # fmt: skip


def base_of(kind: str, auto_class: str = CAUSAL):
    if kind in tiny.CONFIGS:
        return tiny.model(kind, auto_class)
    torch.manual_seed(0)
    return getattr(tr, auto_class).from_config(MORE[kind]()).eval()


def wrap(base, length=6, name="default", **settings):
    config = PrefixTuningV2Config(task_type=None, num_virtual_tokens=length, **settings)
    return get_peft_model(base, config, adapter_name=name).eval()


@torch.no_grad()
def with_text(base, ids, text=TEXT, lengths=None, **kwargs):
    """The base model's logits `[1, tokens, vocabulary]` for each row after the text, without padding."""
    lengths = lengths or [ids.shape[1]] * len(ids)
    rows = [torch.cat([torch.tensor(text), row[len(row) - n :]])[None] for row, n in zip(ids, lengths, strict=True)]
    return [base(input_ids=row, **kwargs).logits[:, len(text) :] for row in rows]


@pytest.mark.parametrize(("kind", "shift"), EXACT)
@torch.no_grad()
def test_as_with_the_text_in_front(kind, shift):
    ids = tiny.ids(3, 6)
    ids, lengths = ids[:, :2] if kind == "mistral" else ids, [2] * 3 if kind == "mistral" else [6, 3, 5]
    expected = with_text(base_of(kind), ids, lengths=lengths)
    plain = base_of(kind)(input_ids=ids).logits

    model = wrap(base_of(kind), shift_positions=shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        init_from_text(model, TEXT)
    assert (expected[0] - plain[:1]).abs().max() > 0.1  # the text has an effect
    whole = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(whole, expected[0], atol=1e-5, rtol=1e-5)

    mask = torch.tensor([[0] * (ids.shape[1] - n) + [1] * n for n in lengths])
    padded = ids * mask
    # The positions that `generate` passes. OPT computes its own from the mask.
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if shift and kind != "opt" else {}
    logits = model(input_ids=padded, attention_mask=mask, **positions).logits
    for row, n, wanted in zip(logits, lengths, expected, strict=True):
        torch.testing.assert_close(row[-n:], wanted[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "shift"), [("llama", True), ("llama", False), ("gpt2", True), ("bloom", False)])
def test_generation_goes_on_behind_the_text(kind, shift):
    ids, lengths = tiny.ids(2, 6), [6, 4]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    base = base_of(kind)
    rows = [torch.cat([torch.tensor(TEXT), row[6 - n :]])[None] for row, n in zip(ids, lengths, strict=True)]
    expected = [base.generate(row, **settings)[0, -8:].tolist() for row in rows]
    model = wrap(base_of(kind), shift_positions=shift)
    init_from_text(model, TEXT)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    assert model.generate(input_ids=ids * mask, attention_mask=mask, **settings)[:, 6:].tolist() == expected


def test_real_weights_and_a_tokenizer(shared):
    folder = str(shared / "models" / "stories260k")
    tokenizer = tr.AutoTokenizer.from_pretrained(folder)
    base = tr.AutoModelForCausalLM.from_pretrained(folder).eval()
    text, rest = "Once upon a time there was a dog named Tim.", " Tim liked to"
    ids, more = tokenizer(text)["input_ids"], tokenizer(rest, add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = with_text(base, torch.tensor([more]), ids)[0]
    written = base.generate(torch.tensor([ids + more]), **settings)[0, len(ids + more) :]
    model = wrap(base, len(ids), prefix_dropout=0.0)
    init_from_text(model, text, tokenizer=tokenizer)
    given = torch.tensor([more])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=given).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(input_ids=given, **settings)[0, len(more) :], written)


def test_tokenizer_with_an_end_token():
    """The end-of-sequence token would stand between the text and the input."""

    class Closing:
        eos_token_id = 2

        def __call__(self, text, **options):
            return {"input_ids": [1, *map(int, text.split()), 2]}

    models = [wrap(base_of("llama"), 4), wrap(base_of("llama"), 4)]
    init_from_text(models[0], "7 40 11", tokenizer=Closing())
    init_from_text(models[1], [1, 7, 40, 11])
    one, other = (model.base_model.prefix_layer.encoder_of("default").embedding.weight for model in models)
    assert torch.equal(one, other)


def test_nothing_else_is_changed():
    """Modes, trained parameters, active adapters and random states stay, and another adapter has no influence."""
    base = base_of("llama")
    expected = with_text(base, tiny.ids(1))[0]
    model = wrap(base, prefix_dropout=0.3)
    model.add_adapter("text", PrefixTuningV2Config(num_virtual_tokens=len(TEXT)))
    tiny.randomize(model)
    model.train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    other = model.base_model.prefix_layer.encoder_of("default").embedding.weight.clone()
    state = torch.get_rng_state()
    init_from_text(model, torch.tensor([TEXT]), "text")
    assert model.training and model.base_model.prefix_layer.training and model.active_adapter == "default"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.base_model.prefix_layer.encoder_of("default").embedding.weight, other)
    model.eval().set_adapter("text")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny.ids(1)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    base = base_of("llama").to(dtype)
    expected = with_text(base, tiny.ids(1))[0]
    model = wrap(base)
    init_from_text(model, TEXT)
    gap = (model(input_ids=tiny.ids(1)).logits - expected).abs().max() / expected.abs().max()
    assert gap < 10 * torch.finfo(dtype).eps


def test_in_a_transformers_model_with_lora():
    base = base_of("llama")
    expected = with_text(base, tiny.ids(1))[0]
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)
    model = inject_adapter_in_model(PrefixTuningV2Config(num_virtual_tokens=len(TEXT)), model).eval()
    init_from_text(model, TEXT)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny.ids(1)).logits, expected, atol=1e-5, rtol=1e-5)


# ---- Models and texts that are rejected


REFUSED = {
    "an encoder": ("bert", "AutoModel", {}, TEXT, "is no decoder"),
    "an encoder-decoder": ("bart", "AutoModel", {}, TEXT, "is an encoder-decoder"),
    "an MLP": ("llama", CAUSAL, {"prefix_projection": True}, TEXT, "has an MLP"),
    "another strength": ("llama", CAUSAL, {"strength": 0.5}, TEXT, "call `set_strength` afterwards"),
    "the other entry point": ("llama", CAUSAL, {"entry_point": "attention"}, TEXT, "taken from the cache"),
    "chosen layers": ("llama", CAUSAL, {"layers_to_transform": [0, 2]}, TEXT, r"layers \[1\].*layers_to_transform"),
    "positions in a table": ("gpt2", CAUSAL, {}, TEXT, "shift_positions=True"),
    "rotary positions in a table": ("gptj", CAUSAL, {}, TEXT, "shift_positions=True"),
    "another length": ("llama", CAUSAL, {}, TEXT[1:], "has 5 tokens.*num_virtual_tokens=5"),
    "a token of another model": ("llama", CAUSAL, {}, [*TEXT[1:], 99], "has the token 99"),
    "no tokens": ("llama", CAUSAL, {}, [], "no tokens"),
    "no tokenizer": ("llama", CAUSAL, {}, "a text", "tokenizer"),
    "no token ids": ("llama", CAUSAL, {}, torch.tensor([TEXT, TEXT]), "must be integers"),
    "too long": ("gpt2", CAUSAL, {"shift_positions": True, "length": 64}, [7] * 64, "has 64 tokens.*64 positions"),
    "a window that it falls out of": ("mistral", CAUSAL, {"length": 12}, TEXT * 2, "look back 8 tokens"),
    "layers with a state": ("jamba", CAUSAL, {}, TEXT, r"layers \[0, 2\] keep no keys"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, auto_class, settings, text, why = REFUSED[case]
    model = wrap(base_of(kind, auto_class), **settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=why):
        init_from_text(model, text)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("frozen", [0, 1])
@torch.no_grad()
def test_the_first_tokens_of_a_longer_text(frozen):
    base, ids = base_of("llama"), tiny.ids(1)
    expected = with_text(base, ids)[0]
    model = wrap(base, num_frozen_tokens=frozen)
    with pytest.raises(ValueError, match=r"has 9 tokens.*truncate=True"):
        init_from_text(model, [*TEXT, 1, 2, 3])
    init_from_text(model, [*TEXT, 1, 2, 3], truncate=True)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_sliding_window_gives_a_warning():
    with pytest.warns(UserWarning, match="look back 8 tokens"):
        init_from_text(wrap(base_of("mistral"), 3), TEXT[:3])


def test_inexact_keys_and_values_are_found(monkeypatch):
    """The outputs are compared, so a layer with other keys is found."""
    model = wrap(base_of("llama"))
    part = PrefixValues._get_part

    def rolled(*args):
        keys, values = part(*args)
        return keys.roll(1, -1), values

    monkeypatch.setattr(PrefixValues, "_get_part", rolled)
    with pytest.raises(ValueError, match="outputs differ by"):
        init_from_text(model, TEXT)


def test_no_such_adapter():
    for start in (lambda model: init_from_text(model, TEXT, "b"), lambda model: init_from(model, "default", "b")):
        with pytest.raises(ValueError, match="no prefix adapter 'b'"):
            start(wrap(base_of("llama")))


# ---- From another adapter


MLP = {"prefix_projection": True, "encoder_hidden_size": 8}


def trained(folder, **settings):
    model = wrap(base_of("llama"), **{"length": 4, **settings})
    tiny.randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("theirs", "ours"), [({}, {}), (MLP, MLP), (MLP, {})])
@torch.no_grad()
def test_the_prefix_of_a_saved_adapter(tmp_path, theirs, ours):
    expected = trained(tmp_path / "source", **theirs)(input_ids=tiny.ids()).logits
    model = wrap(base_of("llama"), 4, **ours)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    init_from(model, tmp_path / "source")
    torch.testing.assert_close(model(input_ids=tiny.ids()).logits, expected, atol=1e-6, rtol=1e-6)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model.save_pretrained(tmp_path / "target")
    again = PeftModel.from_pretrained(base_of("llama"), tmp_path / "target").eval()
    torch.testing.assert_close(again(input_ids=tiny.ids()).logits, expected, atol=1e-6, rtol=1e-6)


def test_another_adapter_of_the_model():
    model = wrap(base_of("llama"), 4, **MLP)
    tiny.randomize(model)
    expected = model(input_ids=tiny.ids()).logits
    model.add_adapter("b", PrefixTuningV2Config(num_virtual_tokens=4))
    init_from(model, "default", "b")
    tiny.randomize(model, seed=9)  # "default", the active adapter, shares no parameters
    model.set_adapter("b")
    torch.testing.assert_close(model(input_ids=tiny.ids()).logits, expected, atol=1e-6, rtol=1e-6)


def test_the_head_stays(tmp_path):
    heads = "AutoModelForSequenceClassification"
    source = get_peft_model(base_of("bert", heads), PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=4))
    tiny.randomize(source)
    source.save_pretrained(tmp_path)
    base = tiny.model("bert", heads, num_labels=5)
    model = get_peft_model(base, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    init_from(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    (table,) = changed
    assert torch.equal(model.get_parameter(table), source.get_parameter(table))


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        ({}, {"length": 5}, "has 4 virtual tokens.*num_virtual_tokens=4"),
        ({}, MLP, "is a table"),
        (MLP, {**MLP, "encoder_hidden_size": 9}, "encoder_hidden_size=8"),
        ({"shift_positions": True}, {}, "shift_positions=True"),
        ({}, {"entry_point": "attention"}, "entry_point='cache'"),
        ({"strength": 0.5}, {}, "`strength=0.5`, and adapter 'default' 1: .*`set_strength`"),
        ({"layers_to_transform": [0, 1]}, {"layers_to_transform": [0, 2]}, "decoder 0,1.*decoder 0,2"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, theirs, ours, why):
    trained(tmp_path / "source", **theirs)
    model = wrap(base_of("llama"), **{"length": 4, **ours})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=why):
        init_from(model, tmp_path / "source")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("theirs", [{}, MLP])
def test_without_a_layout_the_sizes_are_compared(tmp_path, theirs):
    trained(tmp_path, **theirs, layers_to_transform=[0, 1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "prefix_layout": None}))
    model = wrap(base_of("llama"), 4)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 64\)\].*of \[\(4, 96\)\].*same base model"):
        init_from(model, tmp_path)


@pytest.mark.parametrize("theirs", [{}, MLP])
def test_damaged_files(tmp_path, theirs):
    trained(tmp_path, **theirs)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    model = wrap(base_of("llama"), 4)
    for name, tensor in weights.items():
        for other in (None, tensor[:1].clone(), tensor.flatten()[0].clone(), tensor * torch.nan):
            changed = {**weights, name: other} if other is not None else {k: weights[k] for k in weights if k != name}
            save_file(changed or {"x": torch.zeros(1)}, path)
            with pytest.raises(ValueError, match=r"damaged|NaN"):
                init_from(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        init_from(model, tmp_path / "nothing")
    LoraConfig().save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA adapter"):
        init_from(model, tmp_path / "lora")
