"""Ready keys and values for engines: plain transformers with the file in its cache answers as the adapter does."""

import gzip
import json
import warnings
from itertools import islice

import pages
import pytest
import tiny
import torch
import transformers as tr
from safetensors import safe_open
from safetensors.torch import load_file

from prefix_adapter import PrefixTuningV2Config, export_kv, get_peft_model, init_from_text
from prefix_adapter.cli import main

N = 5
SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TWO_KEY_HEADS = {**SIZES, "num_key_value_heads": 2}
GROUPED = {**TWO_KEY_HEADS, "head_dim": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: tr.LlamaConfig(**GROUPED),
    "llama yarn": lambda: tr.LlamaConfig(**GROUPED, max_position_embeddings=256, rope_parameters=YARN),
    "qwen3": lambda: tr.Qwen3Config(**GROUPED),
    "gemma3": lambda: tr.Gemma3TextConfig(
        **GROUPED, sliding_window=32, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    # Rotary embeddings on a quarter of the columns.
    "gpt_neox": lambda: tr.GPTNeoXConfig(**SIZES, max_position_embeddings=128),
    # Neighbouring columns are pairs.
    "cohere": lambda: tr.CohereConfig(**TWO_KEY_HEADS, logit_scale=1.0),
    # No positions in the keys: biases.
    "bloom": lambda: tr.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2),
    # A layer without rotary embeddings among layers with them.
    "smollm3": lambda: tr.SmolLM3Config(**TWO_KEY_HEADS, no_rope_layers=[1, 0, 1]),
    "gpt2": lambda: tiny.config("gpt2"),
}  # fmt: skip


def make(kind: str, **settings):
    """A base model on its own, and a copy of it with an adapter."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tr.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval())
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=N, **settings)
    model = get_peft_model(models[1], config).eval()
    tiny.randomize(model, 1.0)
    return models[0], model


def fill(path, config, rows: int = 1) -> tr.DynamicCache:
    """A plain cache with the keys and values of a file, as docs/engines.md describes the file."""
    cache = tr.DynamicCache(config=config)
    with safe_open(path, "pt") as file:
        for layer in range(int(file.metadata()["num_layers"])):
            pair = [file.get_tensor(f"layers.{layer}.{side}") for side in ("key", "value")]
            cache.update(*(side.expand(rows, -1, -1, -1) for side in pair), layer)
    return cache


def generate_behind(base, path, ids, **options):
    """Greedy tokens behind a filled cache: `generate` wants a token for each key in the cache, and reads none."""
    cache = fill(path, base.config, len(ids))
    n = cache.get_seq_length()
    whole = torch.cat([torch.zeros(len(ids), n, dtype=torch.long), ids], 1)
    mask = torch.ones_like(whole)
    return base.generate(whole, attention_mask=mask, past_key_values=cache, do_sample=False, **options)[:, n:]


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gpt2"])
def test_plain_transformers_with_the_file_answers_as_the_adapter(kind, tmp_path):
    base, model = make(kind)
    path = export_kv(model, tmp_path / "out" / "kv.safetensors", max_tokens=27 if kind == "gemma3" else None)
    ids = tiny.ids(4, 9)
    with torch.no_grad():
        expected, plain = model(input_ids=ids).logits, base(input_ids=ids).logits
        mask = torch.ones(4, N + 9, dtype=torch.long)
        found = base(input_ids=ids, attention_mask=mask, past_key_values=fill(path, base.config, 4)).logits
    assert (expected - plain).abs().max() > 0.5
    assert torch.allclose(found, expected, atol=2e-5)
    options = {"max_new_tokens": 16, "eos_token_id": None}
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert torch.equal(generate_behind(base, path, ids, **options), text)
    assert not torch.equal(base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options), text)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shifted_positions_are_exported_as_they_are(kind, tmp_path):
    base, model = make(kind, shift_positions=True)
    path, ids = export_kv(model, tmp_path / "kv.safetensors"), tiny.ids(2, 9)
    table = model.base_model.prefix_layer.encoder_of("default").fold()
    keys = table[:, : base.config.hidden_size if kind == "gpt2" else 32]
    assert torch.equal(load_file(path)["layers.0.key"].transpose(0, 1).flatten(1), keys)
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert torch.equal(generate_behind(base, path, ids, **options), text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype, tmp_path):
    """Its rotary embeddings are rounded, and the turn is not."""
    _, model = make("qwen3")
    exact = load_file(export_kv(model, tmp_path / "float32.safetensors"))
    halved = load_file(export_kv(model.to(dtype), tmp_path / "half.safetensors", dtype=dtype))
    for name, tensor in halved.items():
        scale = exact[name].abs().max()
        assert tensor.dtype == dtype and (tensor - exact[name]).abs().max() < 2 * torch.finfo(dtype).eps * scale


def test_padding_between_prefix_and_prompt(tmp_path):
    base, model = make("llama")
    path, ids = export_kv(model, tmp_path / "kv.safetensors"), tiny.ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    options = {"max_new_tokens": 16, "eos_token_id": None, "do_sample": False}
    prefix = torch.zeros(3, N, dtype=torch.long)
    whole, shown = torch.cat([prefix, ids], 1), torch.cat([torch.ones_like(prefix), mask], 1)
    text = base.generate(whole, attention_mask=shown, past_key_values=fill(path, base.config, 3), **options)
    assert torch.equal(text[:, N:], model.generate(input_ids=ids, attention_mask=mask, **options))


def test_a_saved_adapter_with_an_mlp(tmp_path, capsys):
    base, model = make("llama", prefix_projection=True, encoder_hidden_size=16)
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    target = tmp_path / "kv.safetensors"
    main(["export-kv", str(tmp_path / "adapter"), str(target), "--dtype", "bfloat16"])
    assert f"Exported to {target}." in capsys.readouterr().out
    direct = export_kv(model, tmp_path / "direct.safetensors")
    with safe_open(target, "pt") as file:
        facts = file.metadata()
    assert {key: facts[key] for key in ("format", "format_version", "num_virtual_tokens", "num_layers", "dtype")} == {
        "format": "prefix-adapter-kv", "format_version": "1", "num_virtual_tokens": "5", "num_layers": "3",
        "dtype": "bfloat16",
    }  # fmt: skip
    assert (facts["prompt_position"], facts["max_tokens"], facts["model_type"]) == ("5", "null", "llama")
    assert [json.loads(facts[key]) for key in ("kv_heads", "key_size", "value_size")] == [[2] * 3, [16] * 3, [16] * 3]
    tensors, exact = load_file(target), load_file(direct)
    assert tensors.keys() == exact.keys() and tensors["layers.2.value"].shape == (2, N, 16)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, exact[name].bfloat16())
    with safe_open(direct, "pt") as file:
        assert file.metadata()["adapter_sha256"] == facts["adapter_sha256"]
    with pytest.raises(SystemExit, match=r"prefix-adapter export-kv: .*exists"):
        main(["export-kv", str(tmp_path / "adapter"), str(target)])


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    words = ["The", "answer", "is", *"abcdefghijkl"]
    folder = tiny.save(tmp_path / "base", "llama", words, "AutoModelForCausalLM", vocab_size=len(words) + 6)
    model = get_peft_model(
        tr.AutoModelForCausalLM.from_pretrained(folder), PrefixTuningV2Config(task_type="CAUSAL_LM")
    ).eval()
    tiny.randomize(model, 1.0)
    model.save_pretrained(tmp_path / "runs" / "writer")
    monkeypatch.chdir(tmp_path)
    pages.run(pages.blocks("docs/engines.md")[0], {})
    defined = pages.run(pages.blocks("docs/engines.md")[1], {"Qwen/Qwen3-0.6B": folder})
    text = model.generate(**defined["inputs"], max_new_tokens=20, do_sample=False)
    assert torch.equal(defined["answer"], text) and "The answer is" in capsys.readouterr().out


REFUSED = [
    ("gpt2", {}, "looks up positions .*wpe.*shift_positions=True"),
    ("llama", {"layers_to_transform": [0, 2]}, r"no prefix in front of layers \[1\]"),
    ("llama", {"lora_r": 2}, "`lora_r=2`"),
    ("llama", {"strength": 0.5}, "`strength` of 0.5"),
    ("llama", {"modules_to_save": ["lm_head"]}, "trained modules besides the prefix .*lm_head"),
    ("gemma3", {}, r"look back 32 tokens.* at most 27 tokens.*`max_tokens=27`"),
]


@pytest.mark.parametrize(("kind", "settings", "words"), REFUSED)
def test_refused(kind, settings, words, tmp_path):
    _, model = make(kind, **settings)
    with pytest.raises(ValueError, match=f"cannot be exported as keys and values: .*{words}"):
        export_kv(model, tmp_path / "kv.safetensors")
    assert not list(tmp_path.iterdir())


def test_refused_models(tmp_path):
    latent = tr.DeepseekV3Config(
        **SIZES, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=3,
    )  # fmt: skip
    dynamic = tr.LlamaConfig(
        **GROUPED, max_position_embeddings=256, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
        "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    )  # fmt: skip
    hybrid = tr.BambaConfig(
        **TWO_KEY_HEADS, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1,
    )  # fmt: skip
    for config, words in (
        (latent, "latent attention"),
        (dynamic, r"more than 64 tokens.*`max_tokens=59`"),
        (hybrid, r"layers \[0, 2\] keep no keys"),
        (tiny.config("bert", is_decoder=False), "no decoder"),
        (tiny.config("bart"), "no decoder"),
    ):
        auto = {"bert": tr.AutoModel, "bart": tr.AutoModelForSeq2SeqLM}.get(config.model_type, tr.AutoModelForCausalLM)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hybrid's layers without a prefix
            model = get_peft_model(auto.from_config(config), PrefixTuningV2Config(num_virtual_tokens=N))
        with pytest.raises(ValueError, match=words):
            export_kv(model, tmp_path / "kv.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_turn_that_is_wrong_is_found(tmp_path, monkeypatch):
    """The comparison after the export is not there for show."""
    from prefix_adapter.adapters import engine

    _, model = make("llama")
    monkeypatch.setattr(engine, "find_turns", lambda *_: {})
    with pytest.raises(ValueError, match="outputs differ by"):
        export_kv(model, tmp_path / "kv.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_default_device_that_is_not_the_models(tmp_path):
    _, model = make("llama")
    expected = load_file(export_kv(model, tmp_path / "expected.safetensors"))
    with tiny.OtherDevice():
        target = export_kv(model, tmp_path / "kv.safetensors")
    found = load_file(target)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_smollm2_answers_100_prompts_with_the_file(shared, tmp_path):
    """Real weights: an instruction with noise on its keys and values, before the beginnings of 100 questions."""
    folder = shared.parent / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip(f"needs SmolLM2-135M in {folder}")
    tokenizer = tr.AutoTokenizer.from_pretrained(folder)
    base, wrapped = (tr.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    start = tokenizer("A customer asks the bank a question. Repeat the question, and answer it in a friendly way.")
    n = len(start["input_ids"])
    model = get_peft_model(wrapped, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=n)).eval()
    init_from_text(model, start["input_ids"])
    table = model.base_model.prefix_layer.encoder_of("default").embedding.weight
    with torch.no_grad():
        table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    path = export_kv(model, tmp_path / "kv.safetensors")
    with gzip.open(shared / "data" / "banking77" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = (tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
        prompts = torch.tensor(list(islice((row[:10] for row in rows if len(row) >= 10), 100)))
    options = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    gap = effect = changed = 0.0
    for ids in prompts.split(25):
        text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        assert torch.equal(generate_behind(base, path, ids, **options), text)
        with torch.no_grad():
            mask = torch.ones(len(text), n + text.shape[1], dtype=torch.long)
            cache = fill(path, base.config, len(text))
            found = base(input_ids=text, attention_mask=mask, past_key_values=cache).logits
            expected, plain = model(input_ids=text).logits, base(input_ids=text).logits
        gap = max(gap, (found - expected).abs().max().item())
        effect = max(effect, (expected - plain).abs().max().item())
        changed += (plain.argmax(-1) != expected.argmax(-1)).any(-1).sum().item()
    print(f"logits differ by {gap:.1e}; the prefix moves them by {effect:.1f} and changes {changed} of 100 texts")
    assert gap < 2e-4 * effect and changed > 90
