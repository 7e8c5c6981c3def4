"""The private names of other libraries (prefix_adapter/private.py): a release that changes one fails here."""

import ast
import importlib
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tr
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from prefix_adapter import PrefixTuningV2Config, PrefixTuningV2Layer, PrefixTuningV2Model, get_peft_model, private

PACKAGE = Path(private.__file__).parent


def test_the_attention_implementation():
    model = tiny.model("llama", attn="eager")
    assert private.get_attention_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert private.get_attention_implementation(model.config) == "sdpa"
    assert private.get_attention_implementation(model.layers[0].self_attn.config) == "sdpa"


def test_a_config_with_another_attention_implementation():
    config = tr.CLIPConfig(attn_implementation="eager")
    changed = private.copy_config(config, "sdpa")
    assert changed._attn_implementation == "sdpa" and changed.vision_config is config.vision_config
    assert {config._attn_implementation, config.vision_config._attn_implementation} == {"eager"}


@pytest.mark.parametrize(
    ("model", "eager"),
    [("vit.ViTAttention", ""), ("timesfm.TimesFmAttention", "simple_"), ("llama4.Llama4VisionAttention", "vision_")],
)
def test_the_attention_interface_of_a_module(model, eager):
    name, _, cls = model.partition(".")
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    found = private.find_attention_interface(getattr(source, cls))
    assert found == (tr.modeling_utils.ALL_ATTENTION_FUNCTIONS, getattr(source, f"{eager}eager_attention_forward"))
    assert private.find_attention_interface(torch.nn.Linear) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = tiny.model("llama").train()
    assert not any(map(private.uses_reentrant_checkpointing, model.modules()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert any(map(private.uses_reentrant_checkpointing, model.modules())) == reentrant


def test_input_gradients():
    model = tiny.model("llama")
    assert not private.has_input_gradients(model)
    model.enable_input_require_grads()
    assert private.has_input_gradients(model)


def test_the_marks_of_a_model_with_adapters():
    model = tiny.model("llama")
    before = set(vars(model))
    peft_model = get_peft_model(model, PrefixTuningV2Config())
    model._hf_peft_config_loaded = True  # transformers sets this on the instance; the class has False
    assert type(model)._hf_peft_config_loaded is False
    peft_model.base_model.prefix_layer.detach()
    private.clear_peft_marks(model)
    assert set(vars(model)) == before


def test_forward_and_offloading_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert private.get_forward_attribute(model[0]) == "forward" and not private.is_offloaded(model)
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    name = private.get_forward_attribute(model[0])
    assert name != "forward" and getattr(model[0], name).__func__ is torch.nn.Linear.forward
    assert private.is_offloaded(model)


def test_the_device_of_offloaded_weights():
    hooks = pytest.importorskip("accelerate.hooks")
    assert private.get_device(torch.nn.Linear(2, 2, device="meta")).type == "meta"
    assert private.get_device(torch.nn.ReLU()) is None
    module = torch.nn.Linear(2, 2)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    assert module.weight.is_meta and private.get_device(module) == torch.device("cpu")
    hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)  # accelerate joins the two in one hook
    assert private.get_device(module) == torch.device("cpu")


def test_the_write_count_of_a_parameter():
    weight = torch.nn.Parameter(torch.zeros(2))
    before = private.get_write_count(weight)
    with torch.no_grad():
        weight.add_(1)
    assert private.get_write_count(weight) > before
    with torch.inference_mode():
        assert private.get_write_count(torch.zeros(2)) == 0


def test_the_children_of_a_module():
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    parent = torch.nn.ModuleDict({"a": one, "b": one})
    assert dict(private.get_children(parent)) == {"a": one, "b": one}
    private.set_children(parent, {"c": other})
    assert dict(parent.named_children()) == {"c": other}


def test_a_compiled_model_is_compiled_in_place():
    inner = torch.nn.Linear(2, 2)
    assert private.compile_in_place(inner) is inner and not private.has_compiled_parts(inner)
    compiled = torch.compile(inner, backend="eager")
    assert private.compile_in_place(compiled) is inner and private.has_compiled_parts(inner)
    assert torch.equal(inner(torch.ones(2)), torch.nn.functional.linear(torch.ones(2), inner.weight, inner.bias))
    private.undo_compile_in_place(inner)
    assert not private.has_compiled_parts(inner)


def test_a_static_address():
    tensor = torch.zeros(2)
    private.mark_static_address(tensor)
    assert tensor._dynamo_static_input_type


def test_operations_without_torch_function():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise AssertionError

    tensor = torch.zeros(2).as_subclass(Loud)
    with private.without_torch_function():
        assert tensor.shape == (2,)


@pytest.mark.parametrize(("theirs", "ours"), [(LoraModel, PrefixTuningV2Model), (BaseTunerLayer, PrefixTuningV2Layer)])
def test_the_private_methods_that_are_overridden(theirs, ours):
    """LoRA's tuner has all methods of `BaseTuner`, and those that PEFT calls only in tuners that have them."""
    listed = {
        name
        for owner, names in private.OVERRIDDEN_PEFT_METHODS.items()
        for name in names
        if owner in {base.__name__ for base in theirs.__mro__}
    }
    own = [vars(base) for base in ours.__mro__ if base.__module__.startswith("prefix_adapter")]
    private_names = {name for names in own for name in names if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private_names if callable(getattr(theirs, name, None))} == listed


def test_other_files_use_no_private_name_of_another_library():
    """Every attribute with an underscore in the core is a name that the core itself defines."""
    files = [path for path in PACKAGE.rglob("*.py") if "training" not in path.parts and path.name != "private.py"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    own, used = set(), {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                (own.add if isinstance(node.ctx, ast.Store) else lambda n, p=path: used.setdefault(n, p))(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    overridden = {name for names in private.OVERRIDDEN_PEFT_METHODS.values() for name in names}
    allowed = {"_fields", "_replace"} | overridden  # of NamedTuple
    assert {name: path.name for name, path in used.items() if name not in own | allowed} == {}
