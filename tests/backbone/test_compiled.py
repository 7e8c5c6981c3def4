"""Wrapping a model, or parts of one, that `torch.compile` was applied to before, as PEFT's LoRA can be."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from prefix_adapter import PrefixTuningV2Config

KIND = ("bert", "AutoModelForSequenceClassification")
IDS = tiny.ids()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def base():
    # Frozen: graphs notice when parameters are frozen by wrapping, and not that hooks come or go.
    return tiny.model(*KIND, num_hidden_layers=1).requires_grad_(False)


def outer(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def layers(model):
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager")
    return model


def config():
    return PrefixTuningV2Config(num_virtual_tokens=4, init_std=1.0, prefix_dropout=0.0, task_type="SEQ_CLS")


def get(model):
    torch.manual_seed(1)
    return get_peft_model(model, config()).eval()


def inject(model):
    torch.manual_seed(1)
    return inject_adapter_in_model(config(), model).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("compiled", "wrap"),
    [(outer, get), (outer, inject), pytest.param(in_place, inject, marks=pytest.mark.slow), (layers, get)],
    ids=lambda f: f.__name__,
)
def test_wrapped_after_compiling(compiled, wrap):
    """Also where graphs were made before: they do not notice that hooks were added."""
    model = compiled(base())
    plain = logits(base())
    torch.testing.assert_close(logits(model), plain)
    wrapped, expected = wrap(model), logits(wrap(base()))
    torch.testing.assert_close(logits(wrapped), expected)
    torch.testing.assert_close(logits(model), expected)  # the user's own reference
    assert not torch.allclose(expected, plain, atol=1e-2)
    names = {name for name, _ in wrap(base()).named_parameters()}
    assert {name for name, _ in wrapped.named_parameters()} == names
    if wrap is inject:
        return
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), plain)
    torch.testing.assert_close(logits(wrapped), expected)
    unloaded = wrapped.unload()
    torch.testing.assert_close(logits(unloaded), plain)
    torch.testing.assert_close(logits(model), plain)


def test_it_is_compiled():
    """As the model was before it was wrapped, with its settings."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrapped = get(torch.compile(base(), backend=count, fullgraph=True))
    expected = logits(get(base()))
    graphs.clear()
    torch.testing.assert_close(logits(wrapped), expected)
    assert len(graphs) == 1


def test_saved_and_loaded(tmp_path):
    """The file, the head's part too, is that of a model that is not compiled."""
    wrapped = get(outer(base()))
    tiny.randomize(wrapped)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    for load in (base, lambda: outer(base())):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path)), expected)


def test_nothing_is_left_of_a_failure():
    model = outer(base())
    expected = logits(model)
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(model, PrefixTuningV2Config(layers_to_transform=[7]))
    assert model._orig_mod._compiled_call_impl is None
    assert not [name for name, _ in model.named_modules() if "prefix" in name] and not hasattr(model, "peft_config")
    torch.testing.assert_close(logits(model), expected)
