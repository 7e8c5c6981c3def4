"""`adapter_names`: each row of a batch has its own adapter, and gives the same output as alone."""

import functools

import pytest
import tiny
import torch
import transformers
from peft import PeftModel, get_peft_model

from prefix_adapter import PrefixTuningV2Config

# Adapters that differ in every setting.
ADAPTERS = {
    "short": {"num_virtual_tokens": 2},
    "long": {"num_virtual_tokens": 6, "prefix_projection": True, "encoder_hidden_size": 8},
    "some": {"num_virtual_tokens": 4, "layers_to_transform": [0, 2]},
    "middle": {"num_virtual_tokens": 5, "layers_to_transform": [1], "prefix_projection": True},
    "shifted": {"num_virtual_tokens": 3, "shift_positions": True},
    "shifted more": {"num_virtual_tokens": 5, "shift_positions": True},
}
NAMES = ["long", "__base__", "short", "some", "middle", "long"]
MIXTURES = {
    "all": NAMES,
    "one for all": ["long"] * 3,
    "base for all": ["__base__"] * 3,
    "no layer in common": ["middle", "some", "__base__"],
    "one row": ["short"],
    "shifted for all": ["shifted"] * 3,
    "shifted by different lengths": ["shifted", "shifted more", "long", "__base__", "shifted"],
}
FORWARD = {
    "bert": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "roberta": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "gpt2": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "bart": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}
DECODERS, TWO_SIDED = ("llama", "gpt2"), ("t5", "bart")


def build(
    kind: str, adapters=ADAPTERS, attn: str | None = None, auto_class: str | None = None, **settings
) -> PeftModel:
    """A tiny model in eval mode with several adapters, the first of which is active."""
    if auto_class is None:
        auto_class, settings["task_type"] = FORWARD[kind]
    base, model = tiny.model(kind, auto_class, attn=attn), None
    for name, own in adapters.items():
        config = PrefixTuningV2Config(**{"prefix_dropout": 0.3, **settings, **own})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    # T5 does not scale its scores, so that the rounding errors of float32 are large.
    return (model.double() if kind == "t5" else model).eval()


@functools.cache
def shared_model(kind: str, attn: str | None = None, auto_class: str | None = None) -> PeftModel:
    """A model for tests that leave it unchanged, as each use of `adapter_names` must."""
    return build(kind, attn=attn, auto_class=auto_class)


def batch(kind: str, rows: int, padding: str = "right", length: int = 8) -> tuple[dict, list[int]]:
    """A batch of rows of different lengths, and the lengths."""
    ids, lengths = tiny.ids(rows, length), [length - row % 4 for row in range(rows)]
    columns = torch.arange(length).expand(rows, -1)
    if padding == "left":
        columns = columns.flip(1)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if kind in TWO_SIDED:
        inputs["decoder_input_ids"] = tiny.ids(rows, 5, seed=9)
    return inputs, lengths


def row_of(inputs: dict, row: int, tokens: int, padding: str = "right") -> dict:
    """A row alone, without its padding."""
    part = slice(-tokens, None) if padding == "left" else slice(None, tokens)
    own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    return {name: tensor if name.startswith("decoder") else tensor[:, part] for name, tensor in own.items()}


def alone(model, name: str, call):
    """The result of `call` with one active adapter, or with none."""
    before = model.active_adapter
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(**inputs).logits


def differ(left: torch.Tensor, right: torch.Tensor, by: float = 1e-3) -> bool:
    return left.shape != right.shape or (left - right).abs().max().item() > by


def check_forward(model, kind: str, names: list[str], padding: str = "right") -> None:
    inputs, lengths = batch(kind, len(names), padding)
    if padding == "left":
        # As in `generate`, the positions of a row do not count its padding.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    mixed = logits(model, **inputs, adapter_names=names)
    for row, (name, tokens) in enumerate(zip(names, lengths, strict=True)):
        own = row_of(inputs, row, tokens, padding)
        expected, base = (alone(model, which, lambda own=own: logits(model, **own)) for which in (name, "__base__"))
        result = mixed[row : row + 1]
        if result.dim() == 3 and kind not in TWO_SIDED:
            result = result[:, -tokens:] if padding == "left" else result[:, :tokens]
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5), f"row {row}, {name}"
        assert differ(expected, base) == (name != "__base__")


# ---- Forward


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("kind", FORWARD)
def test_forward(kind, mixture):
    check_forward(shared_model(kind), kind, MIXTURES[mixture])


@pytest.mark.parametrize("kind", FORWARD)
def test_forward_eager(kind):
    check_forward(shared_model(kind, "eager"), kind, NAMES)


@pytest.mark.parametrize("mixture", ["all", "shifted by different lengths"])
@pytest.mark.parametrize("kind", DECODERS)
def test_forward_padded_on_the_left(kind, mixture):
    check_forward(shared_model(kind), kind, MIXTURES[mixture], "left")


@pytest.mark.parametrize("kind", FORWARD)
def test_which_adapter_is_active_does_not_matter(kind):
    model = shared_model(kind)
    inputs, _ = batch(kind, len(NAMES))
    expected = logits(model, **inputs, adapter_names=NAMES)
    for name in ADAPTERS:

        def compare(name=name):
            own = logits(model, **inputs)
            assert torch.equal(logits(model, **inputs, adapter_names=NAMES), expected)
            assert differ(own, expected)
            # Afterwards the active adapter is active again.
            assert torch.equal(logits(model, **inputs), own) and model.active_adapters == [name]

        alone(model, name, compare)


def test_positional_input():
    model = shared_model("bert")
    inputs, _ = batch("bert", len(NAMES))
    expected = logits(model, **inputs, adapter_names=NAMES)
    with torch.no_grad():
        result = model(inputs["input_ids"], inputs["attention_mask"], adapter_names=NAMES).logits
    assert torch.equal(result, expected) and differ(result, logits(model, **inputs))


def test_input_embeddings():
    model = shared_model("llama")
    inputs, _ = batch("llama", len(NAMES))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    result = logits(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], adapter_names=NAMES)
    assert torch.allclose(result, logits(model, **inputs, adapter_names=NAMES), atol=1e-6)
    assert differ(result, logits(model, **inputs))


@pytest.mark.parametrize("headed", [("short",), ("long", "middle")])
def test_heads_of_some_adapters_only(headed):
    """A row whose adapter has no head uses the base model's head, whichever adapter is active."""
    own = {
        name: {**ADAPTERS[name], "modules_to_save": ["classifier"] if name in headed else None} for name in ADAPTERS
    }
    model = build("bert", own, auto_class="AutoModelForSequenceClassification")
    for active in ("short", "long"):
        model.set_adapter(active)
        check_forward(model, "bert", NAMES)


def test_multiple_choice():
    """The backbone and the head get the choices of a question as neighbouring rows."""
    model = build("bert", auto_class="AutoModelForMultipleChoice", modules_to_save=["classifier"])
    ids = tiny.ids(len(NAMES) * 3).view(len(NAMES), 3, 7)
    mixed = logits(model, input_ids=ids, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        own = {"input_ids": ids[row : row + 1]}
        expected, base = (alone(model, which, lambda own=own: logits(model, **own)) for which in (name, "__base__"))
        assert torch.allclose(mixed[row : row + 1], expected, atol=1e-5), f"row {row}, {name}"
        assert differ(expected, base) == (name != "__base__")


def test_adapters_loaded_for_inference(tmp_path):
    model = shared_model("llama")
    model.save_pretrained(tmp_path)
    inputs, _ = batch("llama", len(NAMES))
    expected = logits(model, **inputs, adapter_names=NAMES)
    loaded = None
    for name in ADAPTERS:
        folder = str(tmp_path / name)
        if loaded is None:
            loaded = PeftModel.from_pretrained(tiny.model("llama", FORWARD["llama"][0]), folder, adapter_name=name)
        else:
            loaded.load_adapter(folder, adapter_name=name)
    # The second time with the plan of the first.
    for _ in range(2):
        assert torch.equal(logits(loaded, **inputs, adapter_names=NAMES), expected)
    loaded.base_model.fold_adapter("long")
    assert torch.allclose(logits(loaded, **inputs, adapter_names=NAMES), expected, atol=1e-5)
    assert differ(expected, logits(loaded, **inputs))


# ---- Generation

LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 2}
CALLS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "beams by generation config": {"generation_config": transformers.GenerationConfig(num_beams=2, **LENGTH)},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


def check_generate(model, kind: str, names: list[str], **settings) -> None:
    padding = "right" if kind in TWO_SIDED else "left"
    inputs, lengths = batch(kind, len(names), padding)
    inputs.pop("decoder_input_ids", None)
    if "generation_config" not in settings:
        settings = {**LENGTH, "do_sample": False, **settings}

    def generate(**kwargs):
        return model.generate(**kwargs, **settings)[:, -5:].tolist()

    before, base = generate(**inputs), alone(model, "__base__", lambda: generate(**inputs))
    mixed = generate(**inputs, adapter_names=names)
    for row, (name, tokens) in enumerate(zip(names, lengths, strict=True)):
        own = row_of(inputs, row, tokens, padding)
        assert mixed[row] == alone(model, name, lambda own=own: generate(**own))[0], f"row {row}, {name}"
    assert sum(one != other for one, other in zip(mixed, base, strict=True)) >= len(names) // 2
    # No state is left.
    assert generate(**inputs) == before and before != mixed


@pytest.mark.parametrize("mixture", ["all", "shifted by different lengths"])
@pytest.mark.parametrize("call", ["greedy", "beams"])
@pytest.mark.parametrize("kind", [*DECODERS, *TWO_SIDED])
def test_generate(kind, call, mixture):
    check_generate(shared_model(kind), kind, MIXTURES[mixture], **CALLS[call])


@pytest.mark.parametrize("call", ["beams by generation config", "no cache", "static cache"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate_in_other_ways(kind, call):
    check_generate(shared_model(kind), kind, NAMES, **CALLS[call])


@functools.cache
def with_heads() -> PeftModel:
    adapters = {name: ADAPTERS[name] for name in ("short", "long")}
    return build("llama", adapters, auto_class="AutoModelForCausalLM", modules_to_save=["lm_head"])


@pytest.mark.parametrize("call", ["greedy", "beams", "beams by generation config"])
def test_generate_with_heads(call):
    """Each beam uses the trained output layer of its row's adapter."""
    check_generate(with_heads(), "llama", ["long", "short", "__base__", "long"], **CALLS[call])


@pytest.mark.parametrize("heads", [False, True])
def test_several_samples_of_a_row(heads):
    model, names = with_heads() if heads else shared_model("llama"), ["long", "short", "__base__"]
    inputs, _ = batch("llama", len(names), "left")
    # Only the most probable token, so that samples can be compared with greedy search.
    sample = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    several = model.generate(**inputs, **LENGTH, **sample, adapter_names=names)
    one = model.generate(**inputs, **LENGTH, do_sample=False, adapter_names=names)
    assert several.tolist() == one.repeat_interleave(2, dim=0).tolist()
    assert one.tolist() != model.generate(**inputs, **LENGTH, do_sample=False).tolist()


# ---- Rejected

WRONG = {
    "unknown name": (["short", "nobody", "long"], ValueError, r"\['nobody'\].*'__base__'"),
    "too few": (["short", "long"], ValueError, "2 names for a batch of 3"),
    "too many": (["short"] * 6, ValueError, "6 names for a batch of 3"),
    # One name for several rows is wrong too.
    "one": (["short"], ValueError, "1 names for a batch of 3"),
    "none": ([], ValueError, "0 names"),
    "a string": ("short", TypeError, "must be a list.*'short'"),
    "a string of the right length": ("abc", TypeError, "must be a list"),
    "not names": ([0, 1, 2], TypeError, "must be a list"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "kind, how",
    [
        ("bert", "keywords"),
        ("bert", "positional"),
        ("bert without task type", "keywords"),
        ("bert without task type", "positional"),
        ("llama", "keywords"),
        ("llama", "generate"),
        ("t5", "keywords"),
        ("t5", "generate"),
    ],
)
def test_wrong_names(kind, wrong, how):
    names, error, words = WRONG[wrong]
    kind, model = kind.split()[0], shared_model(kind.split()[0], auto_class="AutoModel" if " " in kind else None)
    inputs, _ = batch(kind, 3)
    given = {name: tensor for name, tensor in inputs.items() if how != "generate" or not name.startswith("decoder")}

    @torch.no_grad()
    def ask(**adapter_names):
        if how == "generate":
            return model.generate(**given, **LENGTH, do_sample=False, **adapter_names).float()
        if how == "positional":
            return model(*given.values(), **adapter_names)[0]
        return model(**given, **adapter_names)[0]

    before, right = ask(), ask(adapter_names=["long", "middle", "__base__"])
    assert differ(right, before)
    with pytest.raises(error, match=words):
        ask(adapter_names=names)
    assert torch.equal(ask(), before)
    assert torch.equal(ask(adapter_names=["long", "middle", "__base__"]), right)


def test_half_as_many_names_as_rows():
    """Two names for four rows do not mean two rows each."""
    model = shared_model("llama")
    inputs, _ = batch("llama", 4)
    for ask in (
        lambda **kwargs: logits(model, **inputs, **kwargs),
        lambda **kwargs: model.generate(**inputs, **kwargs),
    ):
        with pytest.raises(ValueError, match="2 names for a batch of 4"):
            ask(adapter_names=["short", "long"])


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_refused_in_training(kind):
    model = build(kind, {name: ADAPTERS[name] for name in ("short", "long")})
    inputs, _ = batch(kind, 3)
    before = logits(model, **inputs)
    model.train()
    with pytest.raises(ValueError, match=r"`adapter_names` is for inference: call `model.eval\(\)`"):
        model(**inputs, adapter_names=["short", "long", "__base__"])
    assert torch.isfinite(model(**inputs).logits).all()
    model.eval()
    assert torch.equal(logits(model, **inputs), before)
    assert differ(logits(model, **inputs, adapter_names=["long"] * 3), before)


def test_an_error_in_the_forward_leaves_no_names_behind():
    model = shared_model("bert")
    inputs, _ = batch("bert", 3)
    before = logits(model, **inputs)
    too_long = torch.full((3, tiny.LENGTH + 1), 7)
    with pytest.raises(ValueError, match=f"has {tiny.LENGTH} positions"):
        logits(model, input_ids=too_long, adapter_names=["short", "long", "__base__"])
    assert torch.equal(logits(model, **inputs), before)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name.endswith("classifier"))


def test_with_adapters_disabled():
    """Disabled adapters have no effect, whatever names are given."""
    model = shared_model("bert")
    inputs, _ = batch("bert", len(NAMES))
    expected = logits(model, **inputs, adapter_names=NAMES)
    with model.disable_adapter():
        base = logits(model, **inputs)
        assert torch.equal(logits(model, **inputs, adapter_names=NAMES), base)
    assert torch.equal(logits(model, **inputs, adapter_names=NAMES), expected) and differ(expected, base)
