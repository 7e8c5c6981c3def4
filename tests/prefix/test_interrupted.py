"""The state of a forward ends with it, also after KeyboardInterrupt and SystemExit, for which torch runs no hooks."""

import copy
import functools
import pickle

import pytest
import tiny
import torch
import transformers as tr

from prefix_adapter import PrefixTuningV2Config, get_peft_model


def gpt_neo(**changes):
    """A GPT-Neo, in which every second layer has its own mask. A prefix makes this mask wider."""
    torch.manual_seed(0)
    config = tr.GPTNeoConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=32, intermediate_size=48, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, **changes,
    )  # fmt: skip
    return tr.GPTNeoForCausalLM(config).eval()


BASES = {
    "bert": lambda: tiny.model("bert", "AutoModelForSequenceClassification", num_hidden_layers=2),
    "gpt_neo": gpt_neo,
    "t5": lambda: tiny.model("t5", "AutoModelForSeq2SeqLM", num_layers=1, num_decoder_layers=1),
    "llama": lambda: tiny.model("llama", "AutoModelForCausalLM", num_hidden_layers=2),
}
MIXED = ["default", "__base__"]


@functools.cache
def shared_model(kind: str):
    """A model for tests that must leave it unchanged."""
    model = get_peft_model(BASES[kind](), PrefixTuningV2Config(num_virtual_tokens=5, shift_positions=kind == "llama"))
    tiny.randomize(model)
    return model.eval()


def inputs_of(kind: str) -> dict:
    inputs = {"input_ids": tiny.ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    return {**inputs, "decoder_input_ids": tiny.ids(2, 5, seed=4)} if kind == "t5" else inputs


@torch.no_grad()
def answers(model, kind: str) -> dict[str, torch.Tensor]:
    """The outputs of a model with and without its adapter, and of a part that is called alone."""
    base, inputs = model.base_model.model, inputs_of(kind)
    part = base.get_encoder() if kind == "t5" else base.base_model
    own = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    found = {}
    for enabled in (False, True):
        base.prefix_tuning_v2.enable_adapters(enabled)
        # The part first, because a forward of the whole model would clean up.
        found[f"part, {enabled}"] = part(**own)[0]
        found[f"whole, {enabled}"] = base(**inputs).logits
    found["mixed"] = model(**inputs, adapter_names=MIXED).logits
    return found


def check_same(found: dict, expected: dict, where: str) -> None:
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"{where}: {name}"


def interrupt(module: torch.nn.Module, before: bool, error: type[BaseException]):
    def raise_error(*_):
        raise error

    return module.register_forward_pre_hook(raise_error) if before else module.register_forward_hook(raise_error)


@pytest.mark.parametrize("names", [None, MIXED], ids=["active", "mixed"])
@pytest.mark.parametrize("kind", BASES)
def test_interrupted_at_every_module(kind, names):
    model, inputs = shared_model(kind), inputs_of(kind)
    expected = answers(model, kind)
    assert not torch.allclose(expected["whole, False"], expected["whole, True"], atol=1e-2)
    places = [
        (name, module, before)
        for name, module in model.base_model.model.named_modules()
        for before in (True, False)
        if "prefix_tuning_v2" not in name and (kind == "gpt_neo" or list(module.children()))
    ]
    interrupted = 0
    for turn, (name, module, before) in enumerate(places):
        handle = interrupt(module, before, SystemExit if turn % 2 else KeyboardInterrupt)
        try:
            with torch.no_grad():
                model(**inputs, adapter_names=names)
        except (KeyboardInterrupt, SystemExit):
            handle.remove()
            interrupted += 1
            # Inside the handler, because the traceback keeps the frames of the forward alive, as in a notebook.
            check_same(answers(model, kind), expected, f"interrupted {'before' if before else 'after'} {name}")
        handle.remove()
    assert interrupted > 10


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt_neo"])
def test_interrupted_while_a_layer_is_repeated(kind, use_reentrant):
    """Gradient checkpointing repeats layers in the backward pass, outside of a forward of the model."""
    model = get_peft_model(BASES[kind](), PrefixTuningV2Config(num_virtual_tokens=5, prefix_dropout=0.0))
    tiny.randomize(model)
    expected = answers(model.eval(), kind)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    targets = model.base_model.model.prefix_tuning_v2.targets
    for target in targets:
        loss = model(**inputs_of(kind)).logits.sum()
        handle = interrupt(target.module.get_submodule("k_proj" if kind == "gpt_neo" else "key"), False, SystemExit)
        with pytest.raises(SystemExit):
            loss.backward()
        handle.remove()
        model.zero_grad()
    model.gradient_checkpointing_disable()
    check_same(answers(model.eval(), kind), expected, "after backward")


def test_a_forward_inside_a_forward():
    """A hook may call the model. The state of the outer forward returns when the inner forward ends."""
    model, inputs = shared_model("llama"), inputs_of("llama")
    base, inner = model.base_model.model, []
    expected = answers(model, "llama")

    def ask(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = base(**inputs).logits

    handle = base.model.layers[0].register_forward_hook(ask)
    with torch.no_grad():
        outer = model(**inputs).logits
    handle.remove()
    assert torch.equal(outer, expected["whole, True"]) and torch.equal(inner[0], outer)


@pytest.mark.parametrize("kind", ["bert", "gpt_neo"])
def test_copies_and_unloading(kind):
    """A copy has its own wrapped `forward`, and an unloaded model has none."""
    model = get_peft_model(BASES[kind](), PrefixTuningV2Config(num_virtual_tokens=5))
    tiny.randomize(model)
    expected = answers(model.eval(), kind)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_same(answers(twin, kind), expected, "copy")
        tiny.randomize(twin, seed=9)
        assert not torch.allclose(answers(twin, kind)["whole, True"], expected["whole, True"], atol=1e-2)
    check_same(answers(model, kind), expected, "original")
    base = model.unload()
    assert not [name for name, module in base.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        assert torch.equal(base(**inputs_of(kind)).logits, expected["whole, False"])


def test_replaced_forward_that_hides_the_prefix_is_an_error():
    model = get_peft_model(gpt_neo(), PrefixTuningV2Config(num_virtual_tokens=5)).eval()
    attention = model.base_model.model.transformer.h[1].attn.attention
    attention.forward = functools.partial(type(attention).forward, attention)
    with pytest.raises(RuntimeError, match=r"h\.1\.attn\.attention: its `forward` was replaced"):
        model(input_ids=tiny.ids())
