"""`turn_off_dropout`: a backbone in training mode computes as in eval mode, and a task head keeps its dropout."""

import pytest
import tiny
import torch
import transformers
from peft import get_peft_model

from prefix_adapter import PrefixTuningV2Config, turn_off_dropout


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "bart"])
def test_training_mode_computes_as_eval_mode(kind):
    # Dropout in all of its places, and LayerDrop in BART.
    model = tiny.model(kind).train()
    for module in model.modules():
        for name in ("layerdrop", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    inputs = {"input_ids": tiny.ids()}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = tiny.ids(seed=3)
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    turn_off_dropout(model)
    torch.testing.assert_close(model(**inputs)[0], model.eval()(**inputs)[0])


def test_the_task_head_keeps_its_dropout():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    turn_off_dropout(model)
    assert model.dropout.p == 0.1
    assert all(module.p == 0 for module in model.bert.modules() if isinstance(module, torch.nn.Dropout))


def test_an_adapter_keeps_its_dropout():
    model = get_peft_model(tiny.model("llama"), PrefixTuningV2Config())
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="before `get_peft_model`"):
            turn_off_dropout(each)


def test_a_module_of_its_own():
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.5), transformers.models.bert.modeling_bert.BertOutput(tiny.config("bert"))
    )
    turn_off_dropout(model)
    assert model[0].p == model[1].dropout.p == 0
