"""P-Tuning in stock PEFT and transformers: generation, mixed batches, files, other adapters, and wrong inputs."""

import copy
import json
import pickle

import pages
import pytest
import tiny
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from prefix_adapter import (
    AdapterPool,
    PrefixTuningV2Config,
    PTuningConfig,
    fold,
    get_peft_model,
    init_from,
    init_from_text,
    set_strength,
)
from prefix_adapter.adapters.saved import describe_adapter
from prefix_adapter.training import Recipe, RecipeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
N, V = 3, tiny.VOCAB
MODELS = {
    "bert": "AutoModelForMaskedLM",
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}


def base(kind: str = "llama", **changes):
    return tiny.model(kind, MODELS[kind], **changes)


def ids(batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Token ids with three virtual tokens in each row, one of them twice."""
    given = tiny.ids(batch, 9, seed)
    for place, which in ((1, 0), (3, 2), (4, 1), (7, 2)):
        given[:, place] = V + which
    return given


def wrap(kind: str = "llama", model=None, name: str = "default", seed: int = 2, **settings):
    settings = {"num_virtual_tokens": N, **settings}
    model = get_peft_model(base(kind) if model is None else model, PTuningConfig(**settings), name).eval()
    draw(model, name, seed)
    return model


def draw(model, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key and "ptuning" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def logits(model, given=None, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if given is None else given, **inputs).logits


def embed(model, given) -> torch.Tensor:
    """Input embeddings with the virtual tokens, put together by hand."""
    vectors, table = model.base_model.layer.get_vectors("default"), model.get_base_model().get_input_embeddings()
    with model.disable_adapter():
        words = table(given.clamp(max=V - 1)).detach().clone()
    for row, place in (given >= V).nonzero().tolist():
        words[row, place] = vectors[given[row, place] - V]
    return words


# ---- Generation


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_equals_that_from_embeddings(kind, options):
    model, given = wrap(kind), ids()
    mask = torch.ones_like(given)
    given[0, 0], mask[0, 0] = 0, 0  # padding on the left
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(input_ids=given, **common, **options)
    beams = {"num_beams": options.get("num_beams", 1)}
    with model.disable_adapter():
        expected = model.get_base_model().generate(inputs_embeds=embed(model, given), **common, **beams)
        other = model.generate(input_ids=given.clamp(max=V - 1), **common, **beams)
    assert torch.equal(tokens[:, 9:], expected)
    assert not torch.equal(tokens[:, 9:], other[:, 9:])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_an_encoder_decoder(beams):
    model = wrap("t5", task_type="SEQ_2_SEQ_LM")
    common = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    tokens = model.generate(input_ids=ids(), **common)
    with model.disable_adapter():
        assert torch.equal(model.generate(inputs_embeds=embed(model, ids()), **common), tokens)
    with pytest.raises(ValueError, match="no placeholders of adapter 'default'"):
        model.generate(input_ids=tiny.ids(2, 9), **common)
    with pytest.raises(ValueError, match="without token ids"):
        model.generate(inputs_embeds=embed(model, ids()), **common)
    # PEFT's class for sequence-to-sequence models hands on its inputs late.
    assert torch.isfinite(logits(model, decoder_input_ids=tiny.ids(2, 4))).all()
    assert torch.isfinite(model(input_ids=ids(), labels=tiny.ids(2, 4)).loss)
    with pytest.raises(ValueError, match="no placeholders of adapter 'default'"):
        model(input_ids=tiny.ids(2, 9), labels=tiny.ids(2, 4))


# ---- Placeholders


@pytest.mark.parametrize("which", [[50, 3, 20], [500, 499, 7]], ids=["in the vocabulary", "some beyond it"])
def test_placeholders_are_any_ids_in_any_order(which):
    own = {V: which[0], V + 1: which[1], V + 2: which[2]}
    model, expected = wrap(placeholder_token_ids=which), logits(wrap())
    given = ids().apply_(lambda each: own.get(each, each))
    assert set(tiny.ids(2, 9).flatten().tolist()).isdisjoint(which)
    assert torch.equal(logits(model, given), expected)
    assert model.base_model.get_placeholder_ids() == which


def test_one_placeholder_for_all_virtual_tokens():
    """Its k-th place in a row has the k-th virtual token, wherever it is."""
    model, expected = wrap(placeholder_token_ids=500), wrap()
    given, numbered = tiny.ids(2, 9), tiny.ids(2, 9)
    for row, places in enumerate([(2, 4, 5), (0, 1, 8)]):
        given[row, places] = 500
        numbered[row, places] = torch.arange(V, V + N)
    assert torch.equal(logits(model, given), logits(expected, numbered))
    for count, row in ((4, [500, 500, 500, 500, 9]), (2, [500, 9, 500, 9, 9]), ("no", [9, 9, 9, 9, 9])):
        with pytest.raises(ValueError, match=f"has {count} placeholders of adapter 'default' .500., and needs 3"):
            logits(model, torch.tensor([row]))


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_wrong_inputs(kind):
    model = wrap(kind)
    more = {"decoder_input_ids": tiny.ids(2, 4)} if kind == "t5" else {}
    without = ids()
    without[1] = tiny.ids(1, 9)[0]
    with pytest.raises(
        ValueError, match=r"no placeholders of adapter 'default' \(99 to 101\), and needs at least one"
    ):
        logits(model, without, **more)
    with pytest.raises(ValueError, match=r"token ids 102, beyond the 99 rows .* are 99 to 101 of adapter 'default'"):
        logits(model, ids().masked_fill(ids() == V, V + N), **more)
    if kind != "t5":
        with pytest.raises(ValueError, match="without token ids"):
            model(inputs_embeds=torch.zeros(2, 4, tiny.HIDDEN))
    with model.disable_adapter(), pytest.raises(ValueError, match="none: no adapter is active"):
        logits(model, **more)


def test_virtual_tokens_are_left_out_of_the_loss():
    model, labels = wrap(), ids()
    expected = model(input_ids=ids(), labels=labels.masked_fill(labels >= V, -100)).loss
    assert torch.equal(model(input_ids=ids(), labels=labels).loss, expected)
    hidden = ids()  # a collator for masked language modelling may hide a placeholder
    hidden[0, 3] = 9
    expected = model(input_ids=hidden, labels=labels.masked_fill(labels >= V, -100)).loss
    assert torch.equal(model(input_ids=hidden, labels=labels).loss, expected)
    model = wrap("t5")
    decoded = tiny.ids(2, 4)
    decoded[:, 1] = V
    expected = model(input_ids=ids(), decoder_input_ids=decoded, labels=decoded.masked_fill(decoded == V, -100)).loss
    assert torch.equal(model(input_ids=ids(), decoder_input_ids=decoded, labels=decoded).loss, expected)
    with pytest.raises(ValueError, match="Pass `decoder_input_ids` too"):
        model(input_ids=ids(), labels=decoded)
    # The labels of a classifier are classes, whatever their numbers are.
    classes = ids() % 3
    model = wrap(model=tiny.model("bert", "AutoModelForTokenClassification"), placeholder_token_ids=[1, 2, 50])
    given = tiny.ids(2, 9)
    given[:, 2], given[:, 5] = 1, classes[:, 5]
    given[:, 5] = given[:, 5].clamp(min=1)
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["labels"]), with_kwargs=True
    )
    seen = []
    model(input_ids=given, labels=classes)
    assert torch.equal(seen[0], classes)


def test_a_decoder_and_several_choices_have_virtual_tokens_too():
    model = wrap("t5")
    decoded = tiny.ids(2, 4)
    decoded[:, 1] = V + 1
    changed = logits(model, tiny.ids(2, 6), decoder_input_ids=decoded)
    draw(model, "default", 5)
    assert not torch.allclose(logits(model, tiny.ids(2, 6), decoder_input_ids=decoded), changed, atol=1e-2)
    choice = wrap(model=tiny.model("bert", "AutoModelForMultipleChoice"), modules_to_save=["classifier"])
    rows = logits(choice, ids(6).view(2, 3, 9))
    single = torch.cat([logits(choice, ids(6)[row].view(1, 1, 9)) for row in range(6)])
    torch.testing.assert_close(rows.view(6), single.view(6))


def test_a_model_with_a_second_table_of_token_ids():
    """Gemma 3n has embeddings per layer, whose table has fewer rows than the input embeddings."""
    config = tr.Gemma3nTextConfig(
        vocab_size=V, vocab_size_per_layer_input=V - 3, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=[48] * 4, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=16, num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2, pad_token_id=0, eos_token_id=1,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    torch.manual_seed(0)
    base = tr.AutoModelForCausalLM.from_config(config).eval()
    try:
        base(torch.tensor([[V - 1]]))
    except IndexError:
        pytest.skip(f"Gemma 3n of transformers {tr.__version__} takes no token beyond its second table")
    model = wrap(model=base, encoder_reparameterization_type=None)
    before = logits(model)
    assert torch.equal(logits(model), before)
    draw(model, "default", 5)
    assert not torch.allclose(logits(model), before)
    assert model.generate(input_ids=ids(), max_new_tokens=2).shape == (2, 11)


# ---- Several adapters


def two(kind: str = "llama"):
    model = wrap(kind)
    model.add_adapter("other", PTuningConfig(num_virtual_tokens=N, encoder_reparameterization_type=None))
    draw(model, "other", 5)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_mixed_batch_equals_its_rows_alone(kind):
    model, given, names = two(kind), ids(3), ["other", "__base__", "default"]
    given[1] = tiny.ids(1, 9, seed=8)[0]
    mixed = logits(model, given, adapter_names=names)
    with model.disable_adapter():
        alone = [logits(model, given[1:2])]
    alone.append(logits(model, given[2:]))
    model.set_adapter("other")
    alone.insert(0, logits(model, given[:1]))
    torch.testing.assert_close(mixed, torch.cat(alone), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="beyond the 99 rows"):
        logits(model, ids(3), adapter_names=names)
    without = ids(3)
    without[0] = given[1]
    with pytest.raises(ValueError, match="no placeholders of adapter 'other'"):
        logits(model, without, adapter_names=["other", "default", "default"])
    with pytest.raises(ValueError, match="2 names for a batch of 3"):
        logits(model, given, adapter_names=["other", "default"])


def test_a_mixed_batch_is_generated_with_beams():
    model, given, names = two(), ids(3), ["other", "__base__", "default"]
    given[1] = tiny.ids(1, 9, seed=8)[0]
    common = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    mixed = model.generate(input_ids=given, adapter_names=names, **common)
    for row, name in enumerate(names):
        expected = model.generate(input_ids=given[row : row + 1], adapter_names=[name], **common)
        assert torch.equal(mixed[row : row + 1], expected)


def test_two_active_adapters():
    model = wrap()
    model.add_adapter("more", PTuningConfig(num_virtual_tokens=2, placeholder_token_ids=[300, 301]))
    draw(model, "more", 5)
    model.base_model.set_adapter(["default", "more"])
    model.eval()
    given = ids()
    given[:, 6] = 301
    words = embed(model, given.masked_fill(given == 301, 9))
    words[:, 6] = model.base_model.layer.get_vectors("more")[1]
    output = logits(model, given)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(output, model.get_base_model()(inputs_embeds=words).logits)
    model.add_adapter("same", PTuningConfig(num_virtual_tokens=1))
    model.base_model.set_adapter(["default", "same"])
    with pytest.raises(ValueError, match="'default' and 'same' are both active, and both have the placeholder 99"):
        logits(model)


def test_switching_disabling_deleting_and_unloading():
    plain = base()
    names, words = [name for name, _ in plain.named_modules()], tiny.ids(2, 9)
    before, state = logits(plain, words), set(vars(plain))
    model = wrap(model=plain)
    first = logits(model)
    model.add_adapter("other", PTuningConfig(num_virtual_tokens=N))
    model.set_adapter("other")
    assert not torch.allclose(logits(model), first)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, words), before)
    with pytest.raises(ValueError, match="Virtual tokens cannot be merged"):
        model.merge_and_unload()
    restored = model.unload()
    assert restored is plain and torch.equal(logits(plain, words), before)
    assert [name for name, _ in plain.named_modules()] == names and not plain._forward_pre_hooks
    assert "forward" not in vars(plain.get_input_embeddings())
    assert set(vars(plain)) - state <= {"peft_config", "_hf_peft_config_loaded"}


# ---- Files


@pytest.mark.parametrize("encoder", ["LSTM", "MLP", None])
def test_save_load_and_fold(encoder, tmp_path):
    model = wrap(encoder_reparameterization_type=encoder, task_type="CAUSAL_LM")
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    own = {"embedding", *({"lstm"} if encoder == "LSTM" else ()), *({"hidden", "output"} if encoder else ())}
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in names} == {f"ptuning_{part}" for part in own}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["placeholder_token_ids"]) == ("PTUNING_V1", [V, V + 1, V + 2])
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# P-Tuning adapter" in card and "import prefix_adapter" in card and "`[99, 100, 101]`" in card
    assert ("prefix-adapter fold" in card) == (encoder is not None)

    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "a", low_cpu_mem_usage=low).eval()
        torch.testing.assert_close(logits(loaded), expected, atol=2e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    described = describe_adapter(tmp_path / "a")
    size = sum(parameter.numel() for parameter in model.base_model.layer.parameters())
    assert described["parameters"] == {"virtual tokens": size, "other": 0}

    if encoder is None:
        with pytest.raises(ValueError, match=r"is a table already \(`encoder_reparameterization_type=None`\)"):
            fold(tmp_path / "a", tmp_path / "folded")
        return
    fold(tmp_path / "a", tmp_path / "folded")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "folded").eval()
    torch.testing.assert_close(logits(loaded), expected, atol=2e-5, rtol=1e-5)
    model.base_model.fold_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "b")
    (table,) = load_file(tmp_path / "b" / "adapter_model.safetensors").values()
    assert table.shape == (N, tiny.HIDDEN)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["encoder_reparameterization_type"] is None
    assert json.loads((tmp_path / "folded" / "adapter_config.json").read_text()) == config


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    wrap().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.ptuning.ptuning_embedding.weight"
    bad = {
        "lacks": {name: value for name, value in good.items() if name != key},
        r"has the shape \[4, 32\] where \[3, 32\]": {**good, key: torch.zeros(4, tiny.HIDDEN)},
        "no part of the adapter": {**good, "base_model.model.norm.weight": torch.zeros(2)},
        "NaN or Inf": {**good, key: good[key] * torch.nan},
    }
    for message, tensors in bad.items():
        save_file(tensors, path)
        plain = base()
        names = [name for name, _ in plain.named_modules()]
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(plain, tmp_path)
        assert [name for name, _ in plain.named_modules()] == names and all(
            parameter.requires_grad for parameter in plain.parameters()
        )
    save_file(good, path)
    with pytest.raises(ValueError, match="has the shape"):
        PeftModel.from_pretrained(base(hidden_size=64), tmp_path)


def test_an_adapter_with_its_base_model_from_one_folder(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrap(model=model, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert loaded.active_peft_config.placeholder_token_ids == [V, V + 1, V + 2]
    loaded(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.base_model.layer.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "`num_virtual_tokens` must be an integer of at least 1"),
        ({"placeholder_token_ids": [5, 6]}, "has 2 ids for 3 virtual tokens"),
        ({"placeholder_token_ids": [5, 6, 5]}, "names an id twice"),
        ({"placeholder_token_ids": [5, -6, 7]}, "must be an integer of at least 0"),
        ({"placeholder_token_ids": "<v>"}, "must be a list of token ids"),
        ({"encoder_reparameterization_type": "GRU"}, "must be one of"),
        ({"encoder_reparameterization_type": None, "encoder_hidden_size": 8}, "there is no encoder"),
        ({"encoder_reparameterization_type": "MLP", "encoder_dropout": 0.1}, "there is no LSTM"),
        ({"encoder_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"init_token_ids": [1, 2, 3, 4]}, "has 4 words for 3 virtual tokens"),
        ({"init_std": 0}, "must be above 0"),
        ({"modules_to_save": "lm_head"}, "must be a list of strings"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PTuningConfig(**{"num_virtual_tokens": N, **settings})


def test_settings_that_do_not_fit_the_model():
    with pytest.raises(ValueError, match=r"`init_token_ids` has the ids \[99\], and LlamaForCausalLM has 99 words"):
        wrap(init_token_ids=[99])
    with pytest.raises(ValueError, match="more than the 1e"):
        wrap(num_virtual_tokens=10_000_000)
    vision = tr.ViTModel(
        tr.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    )
    with pytest.raises(ValueError, match="ViTModel has input embeddings of the kind"):
        wrap(model=vision)


# ---- Beside other adapters, and in training


@pytest.mark.parametrize("first", ["virtual tokens", "prefix"])
def test_beside_a_prefix(first):
    """The same outputs in either order of wrapping, and both have an effect and are trained."""
    pair = [(PTuningConfig(num_virtual_tokens=N), "v")]
    pair.append((PrefixTuningV2Config(num_virtual_tokens=4, prefix_dropout=0.0), "p"))
    (one, name), (other, second) = pair if first == "virtual tokens" else pair[::-1]
    model = get_peft_model(get_peft_model(base(), one, name), other, second).eval()
    own = {part: [p for key, p in model.named_parameters() if f".{part}." in key] for part in "vp"}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in own["v"] + own["p"]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    plain = base()
    alone = wrap(model=plain)
    with torch.no_grad():
        for mine, theirs in zip(alone.base_model.layer.parameters(), own["v"], strict=True):
            mine.copy_(theirs)
        only_prefix = get_peft_model(base(), PrefixTuningV2Config(num_virtual_tokens=4, prefix_dropout=0.0)).eval()
        only_prefix.base_model.prefix_layer.encoder_of("default").embedding.weight.copy_(own["p"][0])
        words = embed(alone, ids())
    expected = only_prefix(inputs_embeds=words).logits
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(alone), atol=1e-2)
    tokens = model.generate(input_ids=ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, 9:], only_prefix.generate(inputs_embeds=words, max_new_tokens=4, do_sample=False))
    model.train()(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in own["v"] + own["p"])


def test_each_is_saved_from_its_own_model(tmp_path, monkeypatch):
    """The page's code for two adapters: they come back on a fresh base model."""
    (code,) = (block for block in pages.blocks("docs/ptuning.md") if "selected_adapters" in block)
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(base(), PTuningConfig(num_virtual_tokens=N), "words")
    model = get_peft_model(model, PrefixTuningV2Config(num_virtual_tokens=4, init_std=1.0), "prefix").eval()
    scope = {"model": model, "fresh": base()}
    exec(code, scope)
    assert scope["model"] is not model and torch.equal(logits(scope["model"].eval()), logits(model))


TWO = {
    "prefix inside": (PrefixTuningV2Config(num_virtual_tokens=4), PTuningConfig(num_virtual_tokens=N)),
    "LoRA inside": (LoraConfig(r=2, target_modules=["q_proj"]), PTuningConfig(num_virtual_tokens=N)),
    "LoRA outside": (PTuningConfig(num_virtual_tokens=N), LoraConfig(r=2, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("way", TWO)
def test_one_model_does_not_save_the_adapters_of_both(way, tmp_path):
    """Not with names that fit no base model: in a folder, in a checkpoint of a Trainer, and on the way to the Hub."""
    first, second = map(copy.deepcopy, TWO[way])
    inner = get_peft_model(base(), first, "one")
    model = get_peft_model(inner, second, "two")
    trainer = tr.Trainer(model, tr.TrainingArguments(str(tmp_path / "trainer"), report_to=[]))
    for save in (model.save_pretrained, inner.save_pretrained, trainer.save_model):
        with pytest.raises(ValueError, match=r"is no adapter of this PEFT model.*selected_adapters=\['(one|two)'\]"):
            save(str(tmp_path / "both"))
    assert not list(tmp_path.rglob("adapter_*"))
    for each, own in ((inner, "one"), (model, "two")):
        each.save_pretrained(tmp_path / "both", selected_adapters=[own])
    assert {path.parent.name for path in tmp_path.rglob("adapter_config.json")} == {"one", "two"}


@pytest.mark.parametrize("way", ["prefix inside", "LoRA inside"])
def test_the_outer_adapter_is_unloaded_and_the_inner_one_stays(way):
    first, second = map(copy.deepcopy, TWO[way])
    inner = get_peft_model(base(), first, "one").eval()
    with torch.no_grad():
        for parameter in (each for each in inner.parameters() if each.requires_grad):
            parameter.add_(0.3)
    expected = logits(inner, tiny.ids(2, 9))
    model = get_peft_model(inner, second, "two").eval()
    with pytest.raises(ValueError, match="'one' belongs to a PEFT model inside or around this one"):
        model.delete_adapter("one")
    assert model.unload() is inner and list(inner.peft_config) == ["one"]
    assert torch.equal(logits(inner, tiny.ids(2, 9)), expected)
    assert not torch.allclose(logits(inner.unload(), tiny.ids(2, 9)), expected)


@pytest.mark.parametrize("order", ["lora first", "lora last"])
def test_beside_lora_on_the_embeddings(order):
    """LoRA replaces the embedding module. A virtual token is the adapter's vector, without LoRA's change."""
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = base()
    if order == "lora first":
        model = wrap(model=get_peft_model(model, lora, "l"), name="v")
    else:
        model = get_peft_model(wrap(model=model, name="v"), lora, "l").eval()
    layer = next(module for name, module in model.named_modules() if name.endswith(".ptuning"))
    logits(model)
    output = model.get_input_embeddings()(ids())
    for place, which in ((1, 0), (3, 2), (4, 1), (7, 2)):
        assert torch.equal(output[0, place], layer.get_vectors("v")[which])


@pytest.mark.parametrize(
    ("kind", "names"), [("llama", ["embed_tokens", "lm_head"]), ("bert", ["bert", "cls"])], ids=["embeddings", "all"]
)
def test_the_model_is_trained_beside_the_virtual_tokens(kind, names, tmp_path):
    """PEFT trains copies of modules. Virtual tokens stand in what the copy of the embeddings returns."""
    model = wrap(kind, modules_to_save=names)
    model.add_adapter("second", PTuningConfig(num_virtual_tokens=N))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert any("embed" in key and "modules_to_save" in key for key in trained)
    assert sum("ptuning" in key for key in trained) == 21
    if kind == "bert":  # all that has an effect on the loss
        rest = {key for key, p in model.named_parameters() if p.requires_grad} - trained
        assert not [key for key in rest if "pooler" not in key]
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(base(kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = wrap().train()
        if checkpoints:
            options = {"use_reentrant": reentrant}
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_pickles_are_independent():
    model = wrap()
    expected, copies = logits(model), [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        assert torch.equal(logits(each), expected)
        draw(each, "default", 9)
        assert not torch.equal(logits(each), expected)
    assert torch.equal(logits(model), expected)


def test_a_frozen_encoder_runs_again_when_its_weights_change():
    model = wrap()
    model.requires_grad_(False)
    first = logits(model)
    draw(model, "default", 9)
    second = logits(model)
    assert not torch.allclose(first, second)
    model.requires_grad_(True)
    torch.testing.assert_close(logits(model), second)


def test_an_adapter_in_a_transformers_model():
    model = base()
    inject_adapter_in_model(PTuningConfig(num_virtual_tokens=N), model)
    expected = wrap()
    with torch.no_grad():
        for mine, theirs in zip(model.ptuning.parameters(), expected.base_model.layer.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(logits(model.eval()), logits(expected))


def test_a_larger_vocabulary():
    model = wrap(placeholder_token_ids=[200, 201, 202])
    given = ids().apply_(lambda each: each + 200 - V if each >= V else each)
    expected = logits(model, given)
    model.get_base_model().resize_token_embeddings(V + 7, mean_resizing=False)
    torch.testing.assert_close(logits(model, given)[..., :V], expected)


def test_lower_precision():
    model = wrap(model=base().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.base_model.layer.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("encoder", [pytest.param("LSTM", marks=pytest.mark.slow), None])
def test_a_compiled_model(encoder):
    model = wrap(model=base("bert", num_hidden_layers=1), encoder_reparameterization_type=encoder)
    expected = logits(model)
    torch._dynamo.reset()
    # The compiler does not trace an LSTM: the graph ends there and goes on behind it.
    compiled = torch.compile(model, backend="eager", fullgraph=encoder is None)
    torch.testing.assert_close(logits(compiled), expected)
    draw(model, "default", 9)
    changed = logits(compiled)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, logits(model))


def test_the_whole_model_beside_it(tmp_path, monkeypatch):
    """The page's code for the paper's SuperGLUE runs: both parts learn, and both come back."""
    (code,) = (block for block in pages.blocks("docs/ptuning.md") if "requires_grad_(True)" in block)
    monkeypatch.chdir(tmp_path)
    base = tiny.model("bert", "AutoModelForMaskedLM")
    model = get_peft_model(base, PTuningConfig(num_virtual_tokens=2)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = tiny.ids(2, 9)
    ids[:, [1, 4]] = torch.tensor(model.base_model.get_placeholder_ids())
    seen = {}

    def learn(optimizer):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        seen["unmoved"] = {name for name, each in model.named_parameters() if torch.equal(each, before[name])}
        seen["moved_words"] = not torch.equal(
            base.get_input_embeddings().weight, before["base_model.model.bert.embeddings.word_embeddings.weight"]
        )
        seen["logits"] = model.eval()(input_ids=ids).logits

    scope = {"model": model, "learn": learn}
    exec(code.replace("# ... train ...", "learn(optimizer)"), scope)
    assert seen["moved_words"] and not any("ptuning_" in name for name in seen["unmoved"])
    torch.testing.assert_close(scope["model"].eval()(input_ids=ids).logits, seen["logits"])


def test_what_is_for_prefixes_names_the_way_out(tmp_path):
    """A pool, and a start from a text or from another adapter."""
    model = wrap()
    model.save_pretrained(tmp_path / "words")
    prefix = get_peft_model(base(), PrefixTuningV2Config(num_virtual_tokens=N))
    further = "is_trainable=True"
    cases = [
        (
            lambda: AdapterPool(base()).load(tmp_path / "words"),
            "`model.load_adapter`, and name the adapter of each row",
        ),
        (lambda: init_from(prefix, tmp_path / "words"), further),
        (lambda: init_from(model, tmp_path / "words"), further),
        (lambda: init_from_text(model, [1, 2, 3]), "init_token_ids="),
        (lambda: set_strength(model, 0.5), ""),
    ]
    for refused, way_out in cases:
        with pytest.raises(ValueError, match=f"is a PTUNING_V1 adapter.*{way_out}"):
            refused()


@pytest.mark.parametrize("key", ["init_from", "init_text", "init_rows"])
def test_recipe_keys_for_prefixes(key):
    message = f"`{key}` is for PREFIX_TUNING_V2, not for PTUNING_V1. Leave it out. .* `{{p:"
    with pytest.raises(RecipeError, match=message):
        value = True if key == "init_rows" else "words"
        Recipe("cloze", "unused", "unused", adapter={"peft_type": "ptuning_v1"}, **{key: value})
