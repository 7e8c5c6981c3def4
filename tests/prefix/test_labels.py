"""The names of labels: saved with an adapter, and shown by the model that has it."""

import json

import pytest
import tiny
from peft import (
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
)

from prefix_adapter import PrefixTuningV2Config

# PEFT uses a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
NAMES = ["bad", "so-so", "good"]
HEAD = {"task_type": None, "modules_to_save": ["classifier"]}
DEFAULT = ["LABEL_0", "LABEL_1", "LABEL_2"]


def base(names=None, kind="bert", auto_class="AutoModelForSequenceClassification"):
    model = tiny.model(kind, auto_class)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def config(**settings):
    return PrefixTuningV2Config(**{"task_type": "SEQ_CLS", "num_virtual_tokens": 2, **settings})


def names_of(model):
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    assert model.config.label2id == {name: index for index, name in enumerate(names)}
    return names


def saved_names(folder):
    return json.loads((folder / "adapter_config.json").read_text())["label_names"]


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_an_adapter_brings_the_names_of_its_labels(task, tmp_path):
    auto_class, task_type = f"AutoModelFor{task}", {"S": "SEQ_CLS", "T": "TOKEN_CLS"}[task[0]]
    base(auto_class=auto_class).save_pretrained(tmp_path / "base")
    trained = get_peft_model(base(NAMES, auto_class=auto_class), config(task_type=task_type))
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained.save_pretrained(tmp_path / "adapter")
    assert saved_names(tmp_path / "adapter") == NAMES
    peft_class = {"S": AutoPeftModelForSequenceClassification, "T": AutoPeftModelForTokenClassification}[task[0]]
    assert names_of(peft_class.from_pretrained(tmp_path / "adapter", num_labels=3)) == NAMES
    # The names of a base model that was trained for something else are not those of the adapter's head.
    other = base(["a", "b", "c"], auto_class=auto_class)
    assert names_of(PeftModel.from_pretrained(other, tmp_path / "adapter")) == NAMES
    loaded = base(auto_class=auto_class)
    loaded.load_adapter(str(tmp_path / "adapter"))  # of transformers
    assert names_of(loaded) == NAMES


def test_the_names_are_those_of_the_active_adapter():
    model = get_peft_model(base(NAMES), config())
    model.add_adapter("other", config(label_names=["x", "y", "z"]))
    model.add_adapter("two", config(label_names=["x", "y"]))
    assert names_of(model) == NAMES
    model.set_adapter("other")
    assert names_of(model) == ["x", "y", "z"]
    with model.disable_adapter():
        assert names_of(model) == NAMES
    assert names_of(model) == ["x", "y", "z"]
    model.set_adapter("two")  # another number of labels than the model has
    assert names_of(model) == NAMES
    model.set_adapter("other")
    model.delete_adapter("other")
    assert names_of(model) == NAMES
    model.add_adapter("other", config(label_names=["x", "y", "z"]))
    model.set_adapter("other")
    assert names_of(model.unload()) == NAMES


def test_each_adapter_is_saved_with_its_own_names(tmp_path):
    model = get_peft_model(base(NAMES), config())
    model.add_adapter("given", config(label_names=["x", "y", "z"]))
    model.set_adapter("given")
    model.add_adapter("third", config())
    model.save_pretrained(tmp_path)
    assert saved_names(tmp_path) == saved_names(tmp_path / "third") == NAMES
    assert saved_names(tmp_path / "given") == ["x", "y", "z"]


def test_names_that_a_user_sets_later_stay():
    model = get_peft_model(base(), config(label_names=NAMES))
    model.config.id2label = {0: "mine", 1: "yours", 2: "ours"}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert model.config.id2label == {0: "mine", 1: "yours", 2: "ours"}


@pytest.mark.parametrize(
    ("names", "kind", "auto_class", "settings", "expected"),
    [
        (None, "bert", "AutoModelForSequenceClassification", {}, DEFAULT),
        (NAMES, "bert", "AutoModelForSequenceClassification", {"task_type": None}, None),
        (NAMES, "bert", "AutoModelForSequenceClassification", HEAD, NAMES),
        (None, "bert", "AutoModelForSequenceClassification", HEAD, None),
        (NAMES, "llama", "AutoModelForCausalLM", {"task_type": "CAUSAL_LM"}, None),
        (["", "a\n", "b"], "bert", "AutoModelForSequenceClassification", {}, None),
    ],
)  # fmt: skip
def test_names_are_saved_with_a_head_that_has_them(names, kind, auto_class, settings, expected, tmp_path):
    get_peft_model(base(names, kind, auto_class), config(**settings)).save_pretrained(tmp_path)
    assert saved_names(tmp_path) == expected
    PeftModel.from_pretrained(base(names, kind, auto_class), tmp_path)


def test_one_config_for_several_models_has_the_names_of_none():
    shared = config()
    for names in (NAMES, ["x", "y", "z"]):
        assert names_of(get_peft_model(base(names), shared)) == names
    assert shared.label_names is None and shared.to_dict()["label_names"] is None
