"""Flash attention's contract, by a reference of its documented semantics: the kernels themselves need a GPU.

The masks are 2D or absent, and causality is aligned to the lower right corner (flash-attn's documentation, "causal").
"""

import pytest
import tiny
import torch
import transformers as tr
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from prefix_adapter import PrefixTuningV2Config, get_peft_model

NAME = "flash_attention_reference"


def flash_attention_reference(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(diagonal=keys - queries)
    if attention_mask is not None:
        assert attention_mask.dim() == 2 and attention_mask.shape[1] == keys, "flash attention's mask is [batch, keys]"
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    scores = (query @ key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def _registered():
    tr.AttentionInterface.register(NAME, flash_attention_reference)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def wrapped(kind, attn):
    auto_class = "AutoModelForCausalLM" if kind in ("gpt2", "llama") else "AutoModel"
    model = tiny.model(kind, auto_class, attn="eager")
    if attn != "eager":
        for config in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
            config._attn_implementation = attn
    model = get_peft_model(model, PrefixTuningV2Config(num_virtual_tokens=5)).eval()
    model.add_adapter("short", PrefixTuningV2Config(num_virtual_tokens=2))
    for name in ("default", "short"):
        model.set_adapter(name)
        tiny.randomize(model)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("names", [None, ["short", "__base__"]], ids=["one", "mixed"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
def test_equals_eager(kind, padded, names):
    inputs = {"input_ids": tiny.ids()}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        inputs["attention_mask"][1, -3:] = 0
    if names:
        inputs["adapter_names"] = names
    seen = slice(0, 4) if padded else slice(None)
    with torch.no_grad():
        flash, eager = wrapped(kind, NAME), wrapped(kind, "eager")
        ours = flash(**inputs)[0]
        torch.testing.assert_close(ours[:, seen], eager(**inputs)[0][:, seen], atol=1e-5, rtol=1e-4)
        with flash.disable_adapter():
            inputs.pop("adapter_names", None)
            assert not torch.allclose(flash(**inputs)[0][:1], ours[:1], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_equals_eager(kind):
    ids, mask = tiny.ids(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    results = [
        wrapped(kind, attn).generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for attn in (NAME, "eager")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("when", ["at the start", "at a token"])
def test_a_sliding_window_would_hide_the_prefix_and_is_refused(when):
    torch.manual_seed(0)
    config = tr.MistralConfig(**{**tiny.config("llama").to_dict(), "model_type": "mistral", "sliding_window": 4})
    model = tr.MistralForCausalLM(config)
    if when == "at a token":
        model = get_peft_model(model, PrefixTuningV2Config())
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME
    with pytest.raises(ValueError, match=r"sliding window.*'sdpa' or 'eager'"):
        if when == "at a token":
            model(input_ids=tiny.ids(2, 1))
        else:
            get_peft_model(model, PrefixTuningV2Config())


@pytest.mark.parametrize("kind", ["distilbert", "modernbert"])
def test_the_attention_entry(kind):
    """The function receives the module with its own config: the real one loads its kernel by the name in there."""
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "distilbert":
        config = tr.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    else:
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        config = tr.ModernBertConfig(**small, **special, intermediate_size=48, global_attn_every_n_layers=2)
    inputs = {"input_ids": tiny.ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    inputs["attention_mask"][1, -3:] = 0
    seen, outputs = [], []

    def watched(module, *args, **kwargs):
        seen.append((module.config._attn_implementation, module.config is model.config))
        return flash_attention_reference(module, *args, **kwargs)

    tr.AttentionInterface.register(NAME, watched)
    for attn in ("eager", NAME):
        torch.manual_seed(0)
        model = tr.AutoModel.from_config(config, attn_implementation="eager").eval()
        settings = PrefixTuningV2Config(num_virtual_tokens=5, init_std=1.0, entry_point="attention")
        wrapped = get_peft_model(model, settings).eval()
        model.config._attn_implementation = attn
        if kind == "modernbert" and attn == NAME:
            with pytest.raises(ValueError, match="sliding window would hide the prefix"):
                wrapped(**inputs)
            return
        outputs.append(wrapped(**inputs)[0][:, :4])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    assert set(seen) == {(NAME, True)}
    with pytest.raises(ValueError, match="packed for flash attention"):
        wrapped(**inputs, cu_seq_lens_k=torch.tensor([0, 7, 14]))
