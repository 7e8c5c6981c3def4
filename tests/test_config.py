"""PrefixTuningV2Config: every field is checked when it is said, and none is lost or ignored."""

import json
import subprocess
import sys

import pytest
import tiny
from peft import PeftConfig

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.files.source import AdapterSource
from prefix_adapter.private import running_config_read

BAD = [
    ("num_virtual_tokens", 0), ("num_virtual_tokens", -3), ("num_virtual_tokens", 2.0), ("num_virtual_tokens", True),
    ("num_virtual_tokens", "20"), ("num_virtual_tokens", None), ("prefix_projection", "yes"), ("prefix_projection", 1),
    ("encoder_hidden_size", 0), ("encoder_hidden_size", 1.5), ("prefix_dropout", 1.0), ("prefix_dropout", -0.1),
    ("prefix_dropout", float("nan")), ("prefix_dropout", "0.1"), ("init_std", 0), ("init_std", -1),
    ("init_std", float("inf")), ("layers_to_transform", []), ("layers_to_transform", -1),
    ("layers_to_transform", [0, 0]), ("layers_to_transform", [0, "1"]), ("layers_to_transform", 1.0),
    ("target_attention", []), ("target_attention", ["self"]), ("target_attention", "encoder"),
    ("shift_positions", "no"), ("modules_to_save", "classifier"), ("modules_to_save", [1]), ("task_type", "NLI"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x))
def test_a_wrong_value_is_an_error_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=name.replace("task_type", "task type")):
        PrefixTuningV2Config(**{"prefix_projection": name == "encoder_hidden_size", name: value})


def test_an_mlp_width_without_an_mlp_is_not_ignored():
    with pytest.raises(ValueError, match=r"encoder_hidden_size.*prefix_projection"):
        PrefixTuningV2Config(encoder_hidden_size=8)


def test_an_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="num_layers"):
        PrefixTuningV2Config(num_layers=3)


def test_defaults_are_those_that_are_documented():
    config = PrefixTuningV2Config()
    assert (config.num_virtual_tokens, config.prefix_projection, config.encoder_hidden_size) == (20, False, None)
    assert (config.prefix_dropout, config.init_std, config.shift_positions) == (None, 0.02, False)
    assert (config.layers_to_transform, config.target_attention, config.modules_to_save) == (None, None, None)
    assert config.peft_type == "PREFIX_TUNING_V2" and not config.is_prompt_learning


def test_round_trip_through_adapter_config_json(tmp_path):
    config = PrefixTuningV2Config(
        task_type="SEQ_CLS", num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=16, prefix_dropout=0.25,
        init_std=0.5, layers_to_transform=(2, 0), target_attention=["cross", "encoder"], shift_positions=True,
        modules_to_save=["classifier"], base_model_name_or_path="some/model", revision="v1", inference_mode=True,
    )  # fmt: skip
    assert config.layers_to_transform == [0, 2] and config.target_attention == ["encoder", "cross"]
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, PrefixTuningV2Config):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is PrefixTuningV2Config
        assert again.to_dict() == config.to_dict()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "PREFIX_TUNING_V2" and "target_modules" not in written


def test_a_single_layer_may_be_an_integer():
    assert PrefixTuningV2Config(layers_to_transform=1).layers_to_transform == [1]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layers_to_transform": [1, 7]}, r"layers_to_transform.*\[7\].*\[0, 1, 2\]"),
        ({"target_attention": ["cross"]}, r"target_attention.*cross.*encoder"),
    ],
)
def test_what_the_model_does_not_have_is_an_error_and_leaves_it_as_it_was(changes, what):
    model = tiny.model("bert")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=what):
        get_peft_model(model, PrefixTuningV2Config(**changes))
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    get_peft_model(model, PrefixTuningV2Config())


def test_a_second_adapter_that_does_not_fit_leaves_the_first():
    model = get_peft_model(tiny.model("bert"), PrefixTuningV2Config())
    tiny.randomize(model)
    before = model(input_ids=tiny.ids())[0]
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter("other", PrefixTuningV2Config(layers_to_transform=[9]))
    assert list(model.peft_config) == ["default"]
    model.eval()
    assert model(input_ids=tiny.ids())[0].equal(model(input_ids=tiny.ids())[0])
    assert before.shape == model(input_ids=tiny.ids())[0].shape


SIDE_EFFECTS = """
import sys
import peft, transformers
import peft.tuners.lora, transformers.cache_utils, transformers.integrations.peft, transformers.masking_utils
import transformers.modeling_utils

def of_theirs(name):
    return name.split(".")[0] in ("peft", "transformers")

def snapshot():
    attributes, entries = {}, {}
    for module in [module for name, module in list(sys.modules.items()) if of_theirs(name)]:
        for name, value in list(vars(module).items()):
            attributes[module.__name__, name] = value
            if isinstance(value, type) and of_theirs(value.__module__):
                attributes.update(((value, key), each) for key, each in vars(value).items())
            if type(value) is dict and name.isupper():
                entries[id(value)] = name, dict(value)
    return attributes, entries

attributes, entries = snapshot()
before = set(sys.modules)
import prefix_adapter
later, later_entries = snapshot()
for key, value in attributes.items():
    assert later[key] is value, key
classes = {owner for owner, _ in attributes if isinstance(owner, type)}
print([key for key in later.keys() - attributes.keys() if key[0] in classes])
print(sorted({name for key, (name, old) in entries.items() if old != later_entries[key][1]}))
print(sorted({"datasets", "sklearn", "matplotlib", "tqdm.auto", "pandas"} & (set(sys.modules) - before)))
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_TUNING_V2"] is prefix_adapter.PrefixTuningV2Config
"""


def test_importing_registers_the_method_changes_no_class_of_other_libraries_and_needs_no_extras():
    result = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    new, mappings, extras = result.stdout.splitlines()
    assert new == extras == "[]"
    assert mappings == str([f"PEFT_TYPE_TO_{name}_MAPPING" for name in ("CONFIG", "PREFIX", "TUNER")])


@pytest.mark.parametrize("cls", [PeftConfig, PrefixTuningV2Config])
def test_a_config_knows_the_place_that_it_was_read_from(cls, tmp_path):
    """By `PeftConfig` the folder is found in a private local variable: this fails when PEFT renames it."""
    folder = tmp_path / "outer" / "inner"
    PrefixTuningV2Config().save_pretrained(folder)
    options = {"revision": "v1", "token": "hf_secret", "cache_dir": str(tmp_path)}
    config = cls.from_pretrained(folder.parent, subfolder=folder.name, **options)
    assert config.source == AdapterSource(str(folder.parent), folder.name, options)
    assert PrefixTuningV2Config().source is None and running_config_read() is None
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "num_virtual_tokens": 0}))
    with pytest.raises(ValueError, match=rf"The config of {folder} is damaged: `num_virtual_tokens`"):
        cls.from_pretrained(folder)


def test_one_import_serves():
    for name in prefix_adapter.__all__:
        assert getattr(prefix_adapter, name) is not None
