"""Many processes: what they need to agree on, and what Accelerate needs to be told of a model that it divides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..prefix.layer import PrefixTuningV2Layer
from .model import new_optimizer, trained
from .recipe import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from .recipe import Recipe


def check(accelerator: Accelerator, recipe: Recipe) -> None:
    """See that Accelerate does what the launcher was asked for; some of it it leaves out without a word.

    Raises:
        RecipeError: if it does not, if FSDP was asked for in a way that cannot work, or if the batches cannot be
            shared out evenly.
    """
    processes, parts = int(os.environ.get("WORLD_SIZE", 1)), recipe.gradient_accumulation_steps
    kind, known = accelerator.distributed_type, accelerator.num_processes
    if processes != known:
        raise RecipeError(
            f"The launcher started {processes} processes, and each would do the whole run for itself, as Accelerate "
            "has found no GPUs to connect them. To run on CPUs set the environment variable ACCELERATE_USE_CPU=true."
        )
    for each in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        asked = os.environ.get(f"ACCELERATE_USE_{each.value}", "false").lower() == "true"
        if asked and kind != each:
            raise RecipeError(
                f"The launcher was asked for {each.value}, which Accelerate has only on GPUs and the like; here it "
                "would train without. Use a configuration without it (`accelerate launch --config_file`)."
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("FSDP's first version cannot train a part of the parameters: set `fsdp_version: 2`.")
    if kind == DistributedType.FSDP and os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise RecipeError(
            "`fsdp_auto_wrap_policy`: by size, lists of layers would be gathered for themselves, and so would the "
            "prefix, when it is called; but it is read and never called. Set it to TRANSFORMER_BASED_WRAP."
        )
    if recipe.batch_size % (known * parts):
        raise RecipeError(
            f"`batch_size` is the number of rows of a step in all: {recipe.batch_size} cannot be shared out evenly "
            f"over {known} processes in {parts} parts each. Choose a multiple of {known * parts}."
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


def load_whole(accelerator: Accelerator) -> None:
    """Have transformers load models as they are.

    Under ZeRO-3 it would divide them at once; but whether a model can take a prefix is found out by trying.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()


def prepare(accelerator: Accelerator, model: Any, recipe: Recipe) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Accelerate's `prepare`, with what it needs to be told for FSDP and DeepSpeed.

    Returns:
        The model and its optimizer as Accelerate has prepared them, and the optimizer that PyTorch knows.

    Raises:
        RecipeError: if FSDP cannot have the model as it is configured.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, recipe)
    elif accelerator.distributed_type == DistributedType.FSDP:
        _make_ready_for_fsdp(accelerator, model)
    optimizer = new_optimizer(recipe, model)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _register_prefixes(model)
        accelerator.state.deepspeed_plugin.set_deepspeed_weakref()  # by this transformers generates in step
        return prepared, wrapped, optimizer
    start_moments(optimizer)
    if accelerator.distributed_type == DistributedType.FSDP and hasattr(model, "generate"):
        register_fsdp_forward_method(prepared, "generate")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base._is_fsdp_managed_module = True  # as above
    return prepared, wrapped, optimizer


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW gives it with its first gradient.

    A checkpoint must have the state of all parameters, and some have had no gradient when it is written: a part that
    the task does not use, or the head of a task that was not drawn yet.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


@contextmanager
def whole(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Have parameters whole for a while that ZeRO-3 has divided; others are left as they are.

    Args:
        parameters: the parameters.
        changed: whether they are written to; what the main process writes is kept.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if changed else None):
        yield


def save_parts(engine: Any, folder: Path) -> None:
    """Have every process write its part of what is trained, and of the optimizer, as DeepSpeed does."""
    names = set(trained(engine.module))

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in set(state) - names:  # DeepSpeed leaves out the first name only of a frozen weight that is tied
            del state[name]

    handle = engine.module.register_state_dict_post_hook(drop)
    try:
        engine.save_checkpoint(folder.parent, folder.name, save_latest=False, exclude_frozen_parameters=True)
    finally:
        handle.remove()


def _make_ready_for_fsdp(accelerator: Accelerator, model: Any) -> None:
    plugin = accelerator.state.fsdp_plugin
    buffers = sorted(set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if plugin.cpu_ram_efficient_loading and buffers:
        raise RecipeError(
            f"`fsdp_cpu_ram_efficient_loading`: Accelerate cannot hand on {', '.join(buffers)}; set it to false."
        )
    kinds = sorted({str(parameter.dtype) for parameter in trained(model).values()})
    if accelerator.mixed_precision == "no" and len(kinds) > 1:
        raise RecipeError(
            f"`mixed_precision`: what is trained is in part {' and in part '.join(kinds)}, which FSDP takes under "
            "mixed precision only: set it to bf16."
        )
    # By default Accelerate gathers all of transformers' `_no_split_modules` for themselves. In BERT and its like those
    # are also what holds the input embeddings, which Accelerate shards too, and cannot if they already are.
    embeddings = model.get_input_embeddings()
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        without = {type(module).__name__ for module in model.modules() if embeddings not in module.children()}
        plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules or () if name in without]
    for module in list(model.modules()):
        # All who share a weight must be sharded together. Accelerate does so with the model's own embeddings; the
        # encoder's and the decoder's are others.
        for name, child in list(module.named_children()):
            if type(child) is type(embeddings) and child.weight is embeddings.weight:
                setattr(module, name, embeddings)
        # With `cpu_ram_efficient_loading` the other processes' parameters have no memory, by whose address Accelerate
        # tells them apart in the optimizer. What is in it does not matter: the main process's values come after.
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def _configure_deepspeed(accelerator: Accelerator, recipe: Recipe) -> None:
    parts = recipe.gradient_accumulation_steps
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // (accelerator.num_processes * parts),
        "gradient_accumulation_steps": parts,
        "gradient_clipping": recipe.max_grad_norm,
    }


def _register_prefixes(model: nn.Module) -> None:
    """Have ZeRO-3 gather the prefix for every layer, where it is read just before attention."""
    import deepspeed

    for layer in [module for module in model.modules() if isinstance(module, PrefixTuningV2Layer)]:
        attention = {id(target.module) for target in layer.targets}
        for parent in list(layer.model.modules()):
            if any(id(child) in attention for child in parent.children()):
                for parameter in layer.parameters():
                    deepspeed.zero.register_external_parameter(parent, parameter)
