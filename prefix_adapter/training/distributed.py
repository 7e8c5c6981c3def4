"""Many processes: what they need to agree on, and what Accelerate needs to be told of a model that it shards."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from .model import trained
from .recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator
    from torch.optim import Optimizer


def check(accelerator: Accelerator) -> None:
    """See that Accelerate does what the launcher was asked for; some of it it leaves out without a word.

    Raises:
        RecipeError: if it does not, or FSDP was asked for in a way that cannot work.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != accelerator.num_processes:
        raise RecipeError(
            f"The launcher started {processes} processes, and each would do the whole run for itself, as Accelerate has "
            "found no GPUs to connect them. To run on CPUs set the environment variable ACCELERATE_USE_CPU=true."
        )
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        asked = os.environ.get(f"ACCELERATE_USE_{kind.value}", "false").lower() == "true"
        if asked and accelerator.distributed_type != kind:
            raise RecipeError(
                f"The launcher was asked for {kind.value}, which Accelerate has only on GPUs and the like; here it would "
                "train without. Use a configuration without it (`accelerate launch --config_file`)."
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise RecipeError("FSDP's first version cannot train a part of a model's parameters: set `fsdp_version: 2`.")
        if os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
            raise RecipeError(
                "`fsdp_auto_wrap_policy`: by size, lists of layers would be gathered for themselves, and so would the "
                "prefix, when it is called; but it is read and never called. Set it to TRANSFORMER_BASED_WRAP."
            )


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Have an error in one process end all of them, which would wait for it in vain.

    What is done within must not communicate.

    Raises:
        RecipeError: in the other processes, with the error's message.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather_object([error and f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    for process, message in enumerate(messages):
        if message:
            raise RecipeError(f"Process {process} of {len(messages)} has stopped. {message}")


def prepare(
    accelerator: Accelerator, model: Any, new_optimizer: Callable[[nn.Module], Optimizer]
) -> tuple[Any, Any]:
    """Accelerate's `prepare`, with what it needs to be told for FSDP.

    Raises:
        RecipeError: if FSDP cannot have the model as it is configured.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return accelerator.prepare(model, new_optimizer(model))
    buffers = sorted(set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if plugin.cpu_ram_efficient_loading and buffers:
        raise RecipeError(
            f"`fsdp_cpu_ram_efficient_loading`: Accelerate cannot hand on {', '.join(buffers)}; set it to false."
        )
    kinds = sorted({str(parameter.dtype) for parameter in trained(model).values()})
    if accelerator.mixed_precision == "no" and len(kinds) > 1:
        raise RecipeError(
            f"`mixed_precision`: what is trained is in part {' and in part '.join(kinds)}, which FSDP takes under mixed "
            "precision only: set it to bf16."
        )
    _choose_units(plugin, model)
    _merge_embeddings(model)
    _give_memory(model)
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base._is_fsdp_managed_module = True  # by this transformers generates in step with the other processes
    return model, optimizer


def _choose_units(plugin: Any, model: Any) -> None:
    """Have a model gathered layer by layer, unless the user names other classes.

    By default Accelerate takes all of transformers' `_no_split_modules`. Those of BERT's kind are also the modules that
    hold the input embeddings, which Accelerate shards for themselves, and cannot if they already are.
    """
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" in os.environ:
        return
    embeddings = model.get_input_embeddings()
    whole = {type(module).__name__ for module in model.modules() if embeddings not in module.children()}
    plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules or () if name in whole]


def _merge_embeddings(model: Any) -> None:
    """Give an encoder-decoder one module for its input embeddings, in place of several that share a weight.

    Accelerate shards the model's one together with the output embeddings, and PyTorch wants all who share a weight to be
    sharded together.
    """
    embeddings = model.get_input_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is type(embeddings) and child.weight is embeddings.weight:
                setattr(module, name, embeddings)


def _give_memory(model: nn.Module) -> None:
    """Give memory to trained parameters that have none: those of a process that leaves loading to another one.

    By their addresses Accelerate tells parameters apart in an optimizer; those without would be taken for one. What is in
    the memory does not matter, the loading process's values come after.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
