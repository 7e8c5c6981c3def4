"""Continuous batching: each request gets the text that `generate` gives it alone."""

import inspect

import pytest
import tiny
import torch
import transformers as tr

from prefix_adapter import PrefixTuningV2Config, get_peft_model, set_strength, use_strength

batching = pytest.importorskip("transformers.generation.continuous_batching")
if "kwargs" not in inspect.signature(batching.PagedAttentionCache.update).parameters:
    pytest.skip("continuous batching with a prefix needs transformers 5.23", allow_module_level=True)

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: tr.LlamaConfig(**SIZES),
    "mistral": lambda: tr.MistralConfig(**SIZES, sliding_window=8),
    "gemma3": lambda: tr.Gemma3TextConfig(
        **SIZES,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    ),
    "gpt2": lambda: tiny.config("gpt2"),
}
LENGTHS = (3, 9, 17, 5, 26)


def make(kind: str, attn: str = "sdpa", n_positions: int | None = None, **settings):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.n_positions = n_positions or getattr(config, "n_positions", None)
    base = tr.AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    model = get_peft_model(base, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)).eval()
    tiny.randomize(model, 1.0)
    return model


def prompts() -> list[list[int]]:
    whole = tiny.ids(1, 64)[0].tolist()
    # The same beginning in several prompts: they share blocks of the cache.
    return [whole[:length] if length != 5 else whole[40:45] for length in LENGTHS]


def small(**changes) -> tr.ContinuousBatchingConfig:
    """Small blocks, fewer places than requests, and prompts in slices."""
    sizes = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16, "max_requests_per_batch": 2}
    return tr.ContinuousBatchingConfig(**{**sizes, **changes})


def run(model, inputs, new: int = 8, eos: int = -1, settings=None, **options) -> list[list[int]]:
    """Tokens of continuous batching."""
    settings = settings or small()
    options = {"do_sample": False, **options}
    config = tr.GenerationConfig(max_new_tokens=new, eos_token_id=eos, pad_token_id=0, **options)
    results = model.generate_batch(inputs, generation_config=config, continuous_batching_config=settings, warmup=False)
    assert not [result.error for result in results.values() if result.error]
    return [result.generated_tokens for result in results.values()]


def alone(model, inputs, new: int = 8, eos=None) -> list[list[int]]:
    """Tokens of `generate`, one prompt after the other."""
    texts = []
    for row in inputs:
        ids = torch.tensor([row])
        text = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos,
            pad_token_id=0,
        )  # fmt: skip
        texts.append(text[0, len(row) :].tolist())
    return texts


@pytest.mark.parametrize(
    ("kind", "attn"),
    [
        ("llama", "sdpa"),
        pytest.param("mistral", "sdpa", marks=pytest.mark.slow),
        pytest.param("gemma3", "sdpa", marks=pytest.mark.slow),
        ("gemma3", "eager"),
        ("gpt2", "sdpa"),
    ],
)
def test_each_request_gets_the_text_of_generate(kind, attn):
    model = make(kind, attn)
    expected = alone(model, prompts())
    assert run(model, prompts()) == expected
    assert alone(model, prompts()) == expected  # the model is as it was
    with model.disable_adapter():
        base = alone(model, prompts())
        assert run(model, prompts()) == base
    assert all(ours != theirs for ours, theirs in zip(expected, base, strict=True))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"shift_positions": True}),
        ("llama", {"shift_positions": True, "layers_to_transform": [0, 2]}),
        ("llama", {"lora_r": 2, "prefix_projection": True, "encoder_hidden_size": 8}),
        ("gemma3", {"strength": 0.5}),
    ],
)
def test_settings(kind, settings):
    model = make(kind, **settings)
    assert run(model, prompts()) == alone(model, prompts())


def test_requests_side_by_side_have_more_tokens_than_the_table_of_positions():
    model = make("gpt2", shift_positions=True, n_positions=30)
    settings = small(max_batch_tokens=64, max_requests_per_batch=4)
    rows = prompts()[:4]
    assert sum(map(len, rows)) > model.config.n_positions
    assert run(model, rows, settings=settings) == alone(model, rows)


def test_stop_tokens_and_several_adapters():
    model = make("llama")
    model.add_adapter("other", PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter("other")
    tiny.randomize(model, 1.0, seed=5)
    model.eval()
    texts = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        whole = alone(model, prompts())
        eos = whole[1][4]  # ends one answer early
        texts[name] = alone(model, prompts(), eos=eos)
        assert run(model, prompts(), eos=eos) == texts[name]
        assert len(texts[name][1]) <= 5 < max(map(len, texts[name]))
    assert texts["default"] != texts["other"]


def test_forks_share_their_blocks():
    """Several answers to a prompt: the engine copies the cache of the first one."""
    model = make("llama")
    expected = alone(model, prompts())
    tokens = run(model, prompts(), num_return_sequences=2, do_sample=True, top_k=1)
    assert tokens == [text for text in expected for _ in range(2)]


def test_a_kept_manager_serves_the_adapter_that_is_active():
    """Its cache keeps blocks of earlier requests, which are those of another adapter, or of other parameters."""
    model = make("llama")
    set_strength(model, 1.0)
    settings = small()
    config = tr.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generate():
        results = model.generate_batch(
            prompts(), config, continuous_batching_config=settings, persistent_manager=True, warmup=False
        )
        return [result.generated_tokens for result in results.values()]

    try:
        assert generate() == alone(model, prompts())
        with torch.no_grad():
            model.base_model.prefix_layer.encoder_of("default").embedding.weight.mul_(-1)
        assert generate() == alone(model, prompts())
        set_strength(model, 0.3)
        assert generate() == alone(model, prompts())
        with model.disable_adapter():
            assert generate() == alone(model, prompts())
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_switching_does_not_change_running_requests():
    model = make("llama")
    model.add_adapter("other", PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.eval()
    expected = alone(model, prompts(), 24)
    settings = small()
    config = tr.GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=settings, warmup=False
    ) as manager:
        names = manager.add_requests(prompts(), streaming=False)
        results = {(first := manager.get_result(timeout=60)).request_id: first}
        model.set_adapter("other")
        while len(results) < len(names):
            result = manager.get_result(timeout=60)
            results[result.request_id] = result
    assert [results[name].generated_tokens for name in names] == expected


def test_a_session_keeps_what_is_set_when_it_begins():
    """Its forwards run in a thread of its own, and here they begin after the settings of this thread are gone."""
    model = make("llama")
    with use_strength(model, 0.3):
        expected = [alone(model, prompts()[:1])]
    with model.disable_adapter():
        expected.append(alone(model, prompts()[:1]))
    config = tr.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with use_strength(model, 0.3):
        weak = model.init_continuous_batching(config, small())
    with model.disable_adapter():
        base = model.init_continuous_batching(config, small())
    for manager in (weak, base):
        manager.start()
    try:
        for manager in (weak, base):
            manager.add_request(prompts()[0])
        found = [[manager.get_result(timeout=60).generated_tokens] for manager in (weak, base)]
    finally:
        for manager in (weak, base):
            manager.stop()
    assert found == expected and expected[0] != expected[1] != alone(model, prompts()[:1])


def test_sessions_side_by_side_do_not_disturb_each_other_or_the_model():
    """transformers writes `is_causal` of each of their forwards into the config, where all threads read it."""
    model = make("llama")
    config = tr.GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    ids = tiny.ids()
    with torch.no_grad():
        expected, logits = alone(model, prompts(), 16), model(input_ids=ids).logits
        managers = [model.init_continuous_batching(config, small()) for _ in range(2)]
        for manager in managers:
            manager.start()
            manager.add_requests(prompts(), streaming=False)
        try:
            while any(manager.batch_processor.scheduler.has_pending_requests() for manager in managers):
                assert torch.equal(model(input_ids=ids).logits, logits)
            for manager in managers:
                results = [manager.get_result(timeout=60).generated_tokens for _ in prompts()]
                assert sorted(results) == sorted(expected)
        finally:
            for manager in managers:
                manager.stop()
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_refused_at_once(monkeypatch):
    model = make("llama")
    with pytest.raises(ValueError, match="no place for `adapter_names`"):
        model.generate_batch(prompts(), adapter_names=["default"] * 5)
    with use_strength(model, [0.5, 1.0]), pytest.raises(ValueError, match="the same strength, and 2 are set"):
        run(model, prompts())
    settings = tr.ContinuousBatchingConfig(varlen_compile_config=tr.CompileConfig())
    with pytest.raises(ValueError, match="not compiled"):
        model.generate_batch(prompts(), continuous_batching_config=settings)
    assert run(model, prompts()[:1]) == alone(model, prompts()[:1])
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa' or 'eager'"):
        model.generate_batch(prompts())
    monkeypatch.undo()
    torch.manual_seed(0)
    neo = tr.GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    model = get_peft_model(tr.AutoModelForCausalLM.from_config(neo), PrefixTuningV2Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"does not work on .*GPTNeoForCausalLM: it needs"):
        model.generate_batch(prompts())


def test_unload_leaves_no_trace():
    model = make("llama")
    base = model.unload()
    assert not {"generate_batch", "init_continuous_batching"} & vars(base).keys()
    assert run(base, prompts()) == alone(base, prompts())
