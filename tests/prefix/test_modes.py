"""Training mode: the dropout of a prefix is on exactly where that of PEFT's LoRA is."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from prefix_adapter import PrefixTuningV2Config

METHODS = {
    "lora": lambda: LoraConfig(lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"]),
    "ours": lambda: PrefixTuningV2Config(num_virtual_tokens=4, prefix_dropout=0.5, init_std=1.0),
}


def base(training: bool = False):
    return tiny.model("llama", "AutoModelForCausalLM").train(training)


def native(folder, **kwargs):
    model = base()
    try:
        model.load_adapter(folder, **kwargs)
    except ValueError as error:
        if "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"this transformers and this PEFT do not work together: {error}")
    return model


def second(config, folder, trainable):
    """A model in eval mode gets a second adapter."""
    model = get_peft_model(base(), config()).eval()
    model.load_adapter(folder, "b", is_trainable=trainable)
    model.set_adapter("b")
    return model


PATHS = {
    "get_peft_model": (lambda config, folder: get_peft_model(base(), config()), True),
    "get_peft_model, base in training": (lambda config, folder: get_peft_model(base(True), config()), True),
    "get_peft_model, eval": (lambda config, folder: get_peft_model(base(), config()).eval(), False),
    "inject": (lambda config, folder: inject_adapter_in_model(config(), base()), True),
    "from_pretrained": (lambda config, folder: PeftModel.from_pretrained(base(), folder), False),
    "from_pretrained, train": (
        lambda config, folder: PeftModel.from_pretrained(base(), folder, is_trainable=True),
        True,
    ),
    "load_adapter": (lambda config, folder: second(config, folder, False), False),
    "load_adapter, train": (lambda config, folder: second(config, folder, True), True),
    "native load_adapter": (lambda config, folder: native(folder), False),
    "native load_adapter, train": (lambda config, folder: native(folder, is_trainable=True), True),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_dropout(method, path, tmp_path):
    build, expected = PATHS[path]
    get_peft_model(base(), METHODS[method]()).save_pretrained(tmp_path)
    model = build(METHODS[method], str(tmp_path))
    with torch.no_grad():
        one, other = (model(input_ids=tiny.ids()).logits for _ in range(2))
    assert torch.equal(one, other) is not expected


def test_folding_keeps_the_mode():
    config = PrefixTuningV2Config(prefix_projection=True, encoder_hidden_size=8, prefix_dropout=0.1)
    for training in (True, False):
        model = get_peft_model(base(), config, adapter_name="a").train(training)
        model.base_model.fold_adapter("a")
        assert (model.base_model.prefix_layer.dropout_of("a") > 0) is training
        config = PrefixTuningV2Config(prefix_projection=True, encoder_hidden_size=8, prefix_dropout=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_added_adapter_takes_the_mode_of_the_model(training):
    """PEFT's LoRA has dropout in eval mode here too. Its default is 0, the prefix's is 0.1."""
    model = get_peft_model(base(), METHODS["ours"]()).train(training)
    model.add_adapter("b", METHODS["ours"]())
    model.set_adapter("b")
    one, other = (model(input_ids=tiny.ids()).logits for _ in range(2))
    assert torch.equal(one, other) is not training


def test_a_mixed_batch_with_dropout_is_refused(tmp_path):
    """An adapter that is loaded for training is in training mode, whatever the mode of the model."""
    get_peft_model(base(), METHODS["ours"]()).save_pretrained(tmp_path)
    model = second(METHODS["ours"], tmp_path, True)
    with pytest.raises(ValueError, match=r"`adapter_names` is for inference: call `model.eval\(\)`"):
        model(input_ids=tiny.ids(), adapter_names=["b", "__base__"])
    assert model.eval()(input_ids=tiny.ids(), adapter_names=["b", "__base__"]).logits.isfinite().all()
