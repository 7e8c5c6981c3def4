"""`torch.export` and ONNX: the exported program holds the prefix, also for inputs of another size."""

import numpy as np
import pytest
import tiny
import torch
from torch.export import Dim, export

from prefix_adapter import PrefixTuningV2Config, get_peft_model

KINDS = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
DYNAMIC = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO}}


class Logits(torch.nn.Module):
    """A model as a function of tensors to one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not hasattr(self.model.config, "type_vocab_size"):
            inputs["use_cache"] = False
        return self.model(**inputs).logits


def wrapped(kind, **changes):
    base = tiny.model(kind, KINDS[kind], num_hidden_layers=2)
    model = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=3, prefix_dropout=0.0, **changes)).eval()
    tiny.randomize(model)
    return Logits(model)


def batch(rows, length):
    ids = tiny.ids(rows, length)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("kind", "changes"), [("bert", {}), ("llama", {"prefix_projection": True, "encoder_hidden_size": 12})]
)
@torch.no_grad()
def test_torch_export(kind, changes):
    model = wrapped(kind, **changes)
    program = export(model, batch(2, 7), dynamic_shapes=DYNAMIC).module()
    for inputs in (batch(2, 7), batch(3, 11)):
        torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    with model.model.disable_adapter():
        assert (program(*batch(2, 7)) - model(*batch(2, 7))).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the `works-with` extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs the `works-with` extra")
    model, path = wrapped(kind), tmp_path / "model.onnx"
    torch.onnx.export(model, batch(2, 7), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = runtime.InferenceSession(path)
    for inputs in (batch(2, 7), batch(3, 11)):
        names = [each.name for each in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
        np.testing.assert_allclose(found, model(*inputs).numpy(), rtol=1e-3, atol=1e-4)
    with model.model.disable_adapter():
        assert np.abs(found - model(*inputs).numpy()).max() > 0.1
