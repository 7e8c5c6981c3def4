"""Every private name of another library that this package uses, with the reason.

There is no public way to any of them. `tests/test_private.py` fails when one goes away or changes its meaning. The
training command's uses of Accelerate are in `training/distributed.py`.
"""

from __future__ import annotations

import copy
import dis
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

Module = TypeVar("Module", bound=nn.Module)

# Private methods that PEFT calls and this package defines in its tuner and its tuner layer, by PEFT's class.
OVERRIDDEN_PEFT_METHODS = {
    "BaseTuner": (
        "_cast_adapter_dtype",  # the last step of loading an adapter
        "_check_merge_allowed",  # a prefix cannot be merged into weights
        "_create_and_replace",  # abstract
        "_get_adapter_state_dict",  # collects the tensors that are saved
        "_prepare_adapter_config",  # abstract
        "_remap_adapter_state_dict_for_load",  # receives the tensors that are loaded
        "_replace_module",  # puts task heads back
        "_unload_and_optionally_merge",  # removes the adapter
    ),
    "LoraModel": ("_enable_peft_forward_hooks",),  # receives `adapter_names`, for tuners that have it
    "BaseTunerLayer": ("_move_adapter_to_device_of_base_layer",),  # PEFT expects one base layer here
}


def _find_call(function: Callable[..., Any]) -> dict[str, Any]:
    """The local variables of the innermost running call of a function of another library; empty if there is none."""
    called = inspect.unwrap(function).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not called:
        frame = frame.f_back
    # A copy: from Python 3.13 on `f_locals` is a proxy without all methods of a dictionary.
    return {} if frame is None else dict(frame.f_locals)


# ---- PEFT


class ReadingConfig(NamedTuple):
    """The arguments of a running call of `PeftConfig.from_pretrained`.

    Attributes:
        name: the folder, or the repository on the Hub.
        subfolder: a folder within it, or `None`.
        hub_options: the arguments for `huggingface_hub.hf_hub_download`.
    """

    name: str
    subfolder: str | None
    hub_options: dict[str, Any]


def running_config_read() -> ReadingConfig | None:
    """Find the call of `PeftConfig.from_pretrained` that the calling code runs in.

    PEFT makes a config from the fields in a file, and does not pass it the folder of that file. transformers'
    `load_adapter` changes the model before it reads the weights, so our config must know the folder in order to
    check the weights first. The frames of the running calls are the only place where the folder stands.

    Private names: the local variables `pretrained_model_name_or_path`, `subfolder` and `hf_hub_download_kwargs` of
    `PeftConfig.from_pretrained`. `tests/test_config.py` fails when one of them changes.

    Returns:
        The arguments of that call; `None` outside of such a call.
    """
    found = _find_call(PeftConfig.from_pretrained)
    if not {"pretrained_model_name_or_path", "subfolder", "hf_hub_download_kwargs"} <= found.keys():
        return None
    return ReadingConfig(found["pretrained_model_name_or_path"], found["subfolder"], found["hf_hub_download_kwargs"])


def running_save_names(model: nn.Module) -> list[str]:
    """Find the adapters that a running call of `PeftModel.save_pretrained` saves.

    PEFT asks a tuner for the tensors of one adapter after the other, and writes each before it asks for the next. A
    tuner that finds an adapter that cannot be saved must know the others before the first one is written.

    Private names: the local variables `self` and `selected_adapters` of `PeftModel.save_pretrained`.
    `tests/ptuning/test_ptuning.py` fails when one of them changes.

    Returns:
        The names; empty outside of such a call for this model.
    """
    found = _find_call(PeftModel.save_pretrained)
    return list(found.get("selected_adapters") or ()) if found.get("self") is model else []


# ---- transformers


def running_push_card(folder: str | os.PathLike[str]) -> ModelCard | None:
    """Find the card that a running call of `push_to_hub` will write over the one in a folder.

    transformers' `PushToHubMixin.push_to_hub`, which `PeftModel` inherits, first takes the card of the repository, or
    a template if there is none. Then it saves the model into a temporary folder, writes this card over the one that
    `save_pretrained` has written, and uploads the folder. No method of ours is called with the card. The frame of the
    running call is the only place where it stands; nothing of transformers is patched.

    Private names: the local variables `model_card` and `tmp_dir` of `PushToHubMixin.push_to_hub`.
    `tests/adapters/test_hub.py` fails when one of them changes.

    Returns:
        The card; `None` outside of a call that saves into this folder.
    """
    found = _find_call(PushToHubMixin.push_to_hub)
    card, place = found.get("model_card"), found.get("tmp_dir")
    return card if isinstance(card, ModelCard) and place == os.fspath(folder) else None


_IMPLEMENTATION = "_attn_implementation"


def get_attention_implementation(config: Any) -> str | None:
    """The attention implementation of a model's config (`"sdpa"`, ...): it decides what a mask looks like."""
    return getattr(config, _IMPLEMENTATION, None)


def copy_config(config: Any, attention_implementation: str) -> Any:
    """A copy of a module's config that names another attention implementation.

    The public `_attn_implementation` would change the configs inside it too, which the copy shares with the original.
    """
    changed = copy.copy(config)
    changed._attn_implementation_internal = attention_implementation
    return changed


@lru_cache(maxsize=1024)
def find_attention_interface(cls: Any) -> tuple[Any, Callable[..., Any] | None] | None:
    """Find where a module's class looks up its attention function.

    A class uses transformers' attention interface if one of its methods names `ALL_ATTENTION_FUNCTIONS`, which a
    modeling file imports or defines anew. The function for "eager" is in no mapping. The same method names that
    function, which its modeling file defines as `eager_attention_forward` or with something in front of that name.

    Some classes read the implementation from their config once more, in order to make a mask of their own for "sdpa",
    for instance. They would do something else with a function of another name, so they do not count.

    Returns:
        The mapping, and the function for "eager" (`None` if there is none); `None` if the class uses no interface.
    """
    values = [value for base in cls.__mro__ for value in vars(base).values() if callable(value)]
    methods = [method for method in map(inspect.unwrap, values) if inspect.isfunction(method)]
    reads = [step for method in methods for step in dis.get_instructions(method) if step.argval == _IMPLEMENTATION]
    if len(reads) > 1:
        return None
    for method in methods:
        names, known = method.__code__.co_names, method.__globals__
        interface = known.get("ALL_ATTENTION_FUNCTIONS") if "ALL_ATTENTION_FUNCTIONS" in names else None
        if interface is not None:
            eager = [known[name] for name in names if name.endswith("eager_attention_forward") and name in known]
            return interface, eager[0] if eager else None
    return None


def uses_reentrant_checkpointing(module: nn.Module) -> bool:
    """Whether gradient checkpointing of a module is on in its reentrant form, which drops some gradients."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))


def has_input_gradients(model: nn.Module) -> bool:
    """Whether `enable_input_require_grads` was called; a second call would lose the hooks of the first."""
    return bool(getattr(model, "_require_grads_hooks", None))


def clear_peft_marks(model: nn.Module) -> None:
    """Remove the attributes by which transformers and PEFT know that a model has adapters."""
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(attribute, None)


# ---- accelerate


def get_forward_attribute(module: nn.Module) -> str:
    """The attribute with a module's forward: accelerate keeps it under another name once its hooks are added."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate's hooks load weights of the model only when a module is called."""
    return any(hasattr(module, "_hf_hook") for module in model.modules()) or hasattr(model, "hf_device_map")


def get_device(module: nn.Module) -> torch.device | None:
    """The device that a module runs on; `None` if it has no parameters.

    Weights that accelerate offloads are on the meta device between two calls. Its hooks name the device of the calls.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    if device is None or device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            execution_device = getattr(each, "execution_device", None)
            if execution_device is not None:
                return torch.device(execution_device)
    return device


# ---- torch


def get_write_count(parameter: Tensor) -> int:
    """How often a tensor was written to, as autograd counts it (not in inference mode)."""
    return 0 if parameter.is_inference() else parameter._version


def get_writes(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """A value that changes whenever one of the parameters is written to or replaced."""
    return [(parameter.data_ptr(), get_write_count(parameter)) for parameter in parameters]


def get_children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """A module's children by name. `named_children` skips a child that has two names."""
    return module._modules


def find_outermost(model: nn.Module, kind: type[Module]) -> list[Module]:
    """The modules of a kind that are in no other module of that kind.

    `model.modules()` gives names and removes duplicates, which takes most of the time of a switch of adapters.
    """
    found: list[Module] = []
    pending = [model]
    for module in pending:  # the list grows while it is read
        if isinstance(module, kind):
            found.append(module)
        elif module._modules:
            pending += [child for child in module._modules.values() if child is not None]
    return found


def set_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Replace a module's children."""
    module._modules.clear()
    module._modules.update(children)


def compile_in_place(model: nn.Module) -> nn.Module:
    """Replace the wrapper that `torch.compile` puts around a model by `model.compile()`'s form, and return the model.

    Names of modules and of saved tensors are then those of the model. A model that is not compiled is returned as is.
    """
    inner, compiler = getattr(model, "_orig_mod", None), vars(model).get("dynamo_ctx")
    if inner is None or compiler is None:
        return model
    inner._compiled_call_impl = compiler(inner._call_impl)
    return inner


def undo_compile_in_place(model: nn.Module) -> None:
    """Undo `compile_in_place`."""
    model._compiled_call_impl = None


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether a module of the model was compiled in place."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def mark_static_address(tensor: Tensor) -> None:
    """Tell the compiler that a tensor stays at its address, as transformers' static cache does for CUDA graphs."""
    torch._dynamo.mark_static_address(tensor)


def without_torch_function() -> AbstractContextManager[Any]:
    """Inside this context, operations on a tensor subclass do not call its `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()
