"""What takes a prefix is found by looking, tried out, or refused at wrap time with a word on what to do instead."""

import inspect
import re
import tomllib
import types
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tr
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.models.t5.modeling_t5 import T5Attention

from prefix_adapter import PrefixTuningV2Config, UnsupportedBackboneError, get_peft_model
from prefix_adapter.backbone.calls import CACHE_ARGUMENTS
from prefix_adapter.backbone.find import find_cache_argument

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
REFUSED = {
    "albert": tr.AlbertConfig(**SMALL, embedding_size=16),
    "distilbert": tr.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "deberta-v2": tr.DebertaV2Config(**SMALL),
    "modernbert": tr.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                                      sep_token_id=2),
    "mamba": tr.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
    "xlnet": tr.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_at_wrap_time_with_reason_and_alternatives(kind):
    model = tr.AutoModel.from_config(REFUSED[kind])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as refusal:
        get_peft_model(model, PrefixTuningV2Config())
    said = str(refusal.value)
    assert type(refusal.value) is UnsupportedBackboneError
    assert type(model).__name__ in said and "past_key_values" in said and "LoRA" in said
    assert ("Llama" if kind in ("mamba", "xlnet") else "BERT, RoBERTa") in said
    # Nothing of the model has changed.
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not hasattr(model, "peft_config") and not any(m._forward_pre_hooks for m in model.modules())


def test_the_alternatives_that_are_named_do_work():
    named = (tr.BertConfig, tr.RobertaConfig, tr.XLMRobertaConfig, tr.ElectraConfig, tr.CamembertConfig)
    for config in (*(cls(**SMALL) for cls in named), *(tiny.config(k) for k in ("llama", "gpt2", "t5", "bart"))):
        get_peft_model(tr.AutoModel.from_config(config), PrefixTuningV2Config())
    qwen = tr.Qwen2Config(**SMALL, num_key_value_heads=2)
    opt = tr.OPTConfig(vocab_size=99, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
                       num_attention_heads=4, ffn_dim=48)  # fmt: skip
    mbart = tr.MBartConfig(**{**tiny.config("bart").to_dict(), "model_type": "mbart"})
    for config in (qwen, opt, mbart):
        get_peft_model(tr.AutoModel.from_config(config), PrefixTuningV2Config())


def _cache_in(kwargs):
    return next(name for name in CACHE_ARGUMENTS if name in kwargs)


def _ignore_the_mask(self, hidden_states, attention_mask=None, **kwargs):
    return type(self).forward(self, hidden_states, None, **kwargs)


def _ignore_what_update_returns(self, hidden_states, attention_mask=None, **kwargs):
    cache = kwargs.pop(_cache_in(kwargs))
    if cache is not None:
        cache.update(*(torch.zeros(len(hidden_states), 4, hidden_states.shape[1], 8) for _ in range(2)), 0)
    return type(self).forward(self, hidden_states, None, **kwargs)


@pytest.mark.parametrize(
    ("broken", "why"),
    [(_ignore_the_mask, "sees a prefix that its mask hides"), (_ignore_what_update_returns, "does not see it")],
)
def test_a_module_that_does_not_do_what_it_should_is_refused(broken, why):
    """A model type that nobody has seen may treat a prefix in a way that nobody foresaw."""
    model = tiny.model("bert")
    attention = model.encoder.layer[1].attention.self
    attention.forward = types.MethodType(broken, attention)
    with pytest.raises(UnsupportedBackboneError, match=rf"encoder\.layer\.1\.attention\.self.*{why}"):
        get_peft_model(model, PrefixTuningV2Config())


@pytest.mark.parametrize("offloaded", [False, True])
def test_modules_with_the_same_settings_are_tried_out_once(offloaded):
    """The weights of a large model are not read again and again, in particular not those of an offloaded one."""
    model, calls = tiny.model("bert", num_hidden_layers=4), Counter()
    if offloaded:
        pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))
    for index, layer in enumerate(model.encoder.layer):
        layer.attention.self.query.register_forward_hook(lambda *_, index=index: calls.update([index]))
    model.encoder.layer[2].attention.self.is_causal = True  # another setting
    get_peft_model(model, PrefixTuningV2Config())
    assert calls[0] == calls[2] > 4 and calls[1] == calls[3] == 1


def test_the_old_name_of_the_cache_is_not_asked_for(monkeypatch):
    """transformers 5.24 logs a warning when code asks an output for `past_key_values`."""
    said = []
    monkeypatch.setattr("transformers.utils.generic.logger.warning_once", said.append)
    get_peft_model(tiny.model("bert"), PrefixTuningV2Config())
    assert not said


def test_unknown_attention_implementations_are_refused():
    model = tiny.model("llama", attn="sdpa")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*'sdpa' or 'eager'"):
        get_peft_model(model, PrefixTuningV2Config())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "bart"])
def test_looking_leaves_no_trace(kind):
    """Random numbers, train mode of each module, gradients and buffers are as before."""
    plain, wrapped = tiny.model(kind).train(), tiny.model(kind).train()
    plain.get_input_embeddings().eval(), wrapped.get_input_embeddings().eval()
    torch.manual_seed(3)
    get_peft_model(wrapped, PrefixTuningV2Config(prefix_dropout=0.0))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    # All that may be drawn is the adapter's own start.
    shape = wrapped.prefix_tuning_v2.prefix_tuning_v2_embedding["default"].weight.shape
    torch.nn.init.normal_(torch.nn.Embedding(*shape).weight)
    assert torch.equal(torch.rand(3), drawn)
    modes = {name: module.training for name, module in plain.named_modules()}
    assert {n: m.training for n, m in wrapped.named_modules() if "prefix_tuning" not in n} == modes
    assert all(p.grad is None for p in wrapped.parameters())
    for name, buffer in plain.named_buffers():
        assert torch.equal(wrapped.get_buffer(name), buffer)


def test_a_hybrid_gives_its_attention_layers_the_prefix_and_says_so():
    config = tr.JambaConfig(
        **SMALL, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=9,
        mamba_d_state=4, mamba_d_conv=2, num_experts=2, use_mamba_kernels=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"Layers \[0\] of JambaModel keep no keys and values"):
        model = get_peft_model(tr.AutoModel.from_config(config), PrefixTuningV2Config())
    slots = model.base_model.model.prefix_tuning_v2.adapters["default"].columns
    assert [slot.layer for slot in slots] == [1]


def test_shapes_are_those_of_the_layers():
    """Grouped-query attention has fewer heads; an encoder-decoder has three kinds of attention."""
    llama = get_peft_model(tiny.model("llama"), PrefixTuningV2Config(num_virtual_tokens=5))
    layer = llama.base_model.model.prefix_tuning_v2
    assert layer.prefix_tuning_v2_embedding["default"].weight.shape == (5, tiny.LAYERS * 2 * 2 * 8)
    bart = get_peft_model(tiny.model("bart"), PrefixTuningV2Config(num_virtual_tokens=5))
    columns = bart.base_model.model.prefix_tuning_v2.adapters["default"].columns
    assert [slot.kind for slot in columns] == ["encoder"] * 3 + ["decoder"] * 3 + ["cross"] * 3
    assert [slot.layer for slot in columns] == [0, 1, 2] * 3


# ---- A cache under a name that nobody has foreseen


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_a_cache_is_found_by_what_it_is(kind, typed):
    """transformers 5.24 renamed the argument, and may do so again: an unknown name changes nothing."""
    expected, model = tiny.model(kind), tiny.model(kind)
    wrapped = get_peft_model(expected, PrefixTuningV2Config(prefix_dropout=0.0))
    names = [target.name for target in expected.prefix_tuning_v2.targets]
    plain = type(model.get_submodule(names[0]))
    argument = find_cache_argument(model.get_submodule(names[0]))

    class Renamed(plain):
        def __call__(self, *args, **kwargs):
            if argument in kwargs:
                kwargs["kv_store"] = kwargs.pop(argument)
            return super().__call__(*args, **kwargs)

        def forward(self, hidden_states, *args, kv_store=None, **kwargs):
            return super().forward(hidden_states, *args, **{argument: kv_store}, **kwargs)

    renamed = {argument: "kv_store"}
    signature = inspect.signature(plain.forward)
    parameters = [p.replace(name=renamed.get(p.name, p.name)) for p in signature.parameters.values()]
    Renamed.forward.__signature__ = signature.replace(parameters=parameters)
    if typed:
        Renamed.forward.__annotations__["kv_store"] = tr.Cache | None
    for name in names:
        model.get_submodule(name).__class__ = Renamed
    again = get_peft_model(model, PrefixTuningV2Config(prefix_dropout=0.0))
    again.load_state_dict(wrapped.state_dict())
    for each in (wrapped, again):
        tiny.randomize(each)
    assert torch.equal(again(tiny.ids())[0], wrapped(tiny.ids())[0])


def test_an_older_name_of_the_cache_is_accepted():
    """A caller's module may use the old name, which transformers renames inside `forward` only."""
    model = tiny.model("llama")
    attention = model.layers[0].self_attn
    if find_cache_argument(attention) != "cache":
        pytest.skip("this transformers has the old name alone")
    get_peft_model(model, PrefixTuningV2Config(init_std=1.0, prefix_dropout=0.0))
    seen = torch.randn(1, 4, 32)
    call = {"position_embeddings": model.rotary_emb(seen, torch.arange(4)[None]), "attention_mask": None}
    with torch.no_grad():
        expected = attention(seen, **call, cache=tr.DynamicCache())[0]
        older = attention(seen, **call, past_key_values=tr.DynamicCache())[0]
        unknown = attention(seen, **call)[0]
    assert torch.equal(unknown, expected)  # a call without a cache has the prefix too
    assert torch.equal(older, expected)


def test_positions_that_cannot_be_moved_are_refused(monkeypatch):
    """transformers 5.24 renamed the number of tokens before as well. An unknown name would silently move nothing."""
    table = type(tiny.model("bart").encoder.embed_positions)

    def renamed(self, input_ids, count=0, position_ids=None):
        return torch.nn.Embedding.forward(self, torch.arange(input_ids.shape[1])[None] + count + self.offset)

    monkeypatch.setattr(table, "forward", renamed)
    get_peft_model(tiny.model("bart"), PrefixTuningV2Config())
    with pytest.raises(ValueError, match=r"encoder\.embed_positions of BartModel counts positions"):
        get_peft_model(tiny.model("bart"), PrefixTuningV2Config(shift_positions=True))


# ---- Versions


def test_a_refusal_by_an_untested_transformers_says_so(monkeypatch):
    monkeypatch.setattr("prefix_adapter.backbone.unsupported.transformers.__version__", "5.99.0")
    with pytest.raises(
        UnsupportedBackboneError, match=r"transformers 5\.99\.0 is installed.*pip install 'transformers"
    ):
        get_peft_model(tr.AutoModel.from_config(REFUSED["albert"]), PrefixTuningV2Config())


def test_the_bound_on_transformers_is_the_newest_minor_that_the_constraints_install():
    root = Path(__file__).resolve().parents[2]
    newest = Version(re.search(r"^transformers==(.*)$", (root / "constraints.txt").read_text("utf-8"), re.M)[1])
    dependencies = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    bound = next(r.specifier for r in map(Requirement, dependencies) if r.name == "transformers")
    assert newest in bound and Version(f"{newest.major}.{newest.minor + 1}") not in bound
    assert Version(f"{newest.major}.{newest.minor}.99") in bound


def test_attention_that_gives_all_of_the_softmax_to_one_token():
    """T5 does not divide its scores. A prefix of small numbers then changes nothing, which says nothing about T5."""
    base = tiny.model("t5")
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, T5Attention):  # a token attends to itself
                module.k.weight.mul_(4)
                module.q.weight.copy_(module.k.weight)
    model = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=3)).eval()
    inputs = {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids(seed=4)}
    tiny.randomize(model, std=100)
    with torch.no_grad():
        ours = model(**inputs)[0]
        with model.disable_adapter():
            assert not torch.allclose(ours, model(**inputs)[0])


@pytest.mark.parametrize(("kind", "entry_point"), [("bert", "cache"), ("t5", "cache"), ("deberta-v2", "attention")])
def test_a_default_device_that_is_not_the_models(kind, entry_point):
    model = tr.AutoModel.from_config(REFUSED[kind]) if kind in REFUSED else tiny.model(kind)
    inputs = {"input_ids": tiny.ids()} | ({"decoder_input_ids": tiny.ids()} if kind == "t5" else {})
    with tiny.OtherDevice():
        model = get_peft_model(model, PrefixTuningV2Config(num_virtual_tokens=3, entry_point=entry_point))
        model(**inputs)
