"""Runs on several processes: launch checks, errors of one process, and settings for FSDP and DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..messages import join_names
from ..prefix.layer import PrefixTuningV2Layer
from .model import new_optimizer, trained_parameters
from .recipe import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from .recipe import Recipe


def check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    """Check that Accelerate does what the launcher was asked for; it ignores some settings silently.

    Raises:
        RecipeError: if Accelerate ignores a setting, if the FSDP settings cannot work, or if a batch does not split
            evenly over the processes.
    """
    processes, parts = int(os.environ.get("WORLD_SIZE", 1)), recipe.gradient_accumulation_steps
    kind, connected = accelerator.distributed_type, accelerator.num_processes
    if processes != connected:
        raise RecipeError(
            f"The launcher started {processes} processes, but Accelerate found no GPUs and did not connect them: each "
            "would repeat the whole run. To run on CPUs set the environment variable ACCELERATE_USE_CPU=true."
        )
    for each in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        requested = os.environ.get(f"ACCELERATE_USE_{each.value}", "false").lower() == "true"
        if requested and kind != each:
            raise RecipeError(
                f"The launcher was asked for {each.value}, which Accelerate has only on GPUs and similar devices. "
                "Here it would train without. Use a configuration without it (`accelerate launch --config_file`)."
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("FSDP version 1 cannot train a subset of the parameters: set `fsdp_version: 2`.")
    if kind == DistributedType.FSDP and os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise RecipeError(
            "`fsdp_auto_wrap_policy`: SIZE_BASED_WRAP also wraps module lists and the prefix, which are never called "
            "themselves, so their weights would not be gathered. Set it to TRANSFORMER_BASED_WRAP."
        )
    divided = tensor_parallel_size(accelerator)
    if divided > 1 and kind != DistributedType.MULTI_GPU:
        raise RecipeError(
            f"`parallelism_config_tp_size`: tensor parallelism cannot be combined with {kind.value} here. Accelerate "
            f"{accelerate.__version__} needs a part of transformers for it that transformers "
            f"{transformers.__version__} does not have. Use `distributed_type: MULTI_GPU` with all processes for "
            "tensor parallelism (examples/accelerate/tensor_parallel.yaml), or FSDP without `parallelism_config`."
        )
    for part in ("adapter", "second_adapter"):
        method = getattr(recipe, part).get("peft_type", "PREFIX_TUNING_V2")
        if divided > 1 and method != "PREFIX_TUNING_V2":
            raise RecipeError(
                f"`{part}.peft_type`: under tensor parallelism PREFIX_TUNING_V2 can be trained, with `lora_r` too, "
                f"and {method} cannot. Use a configuration without `parallelism_config`."
            )
    shares = connected // divided
    if recipe.batch_size % (shares * parts):
        raise RecipeError(
            f"`batch_size` is the number of rows of a step over all processes: {recipe.batch_size} does not split "
            f"evenly over {shares} processes in {parts} parts each. Choose a multiple of {shares * parts}."
        )


def tensor_parallel_size(accelerator: Accelerator) -> int:
    """Over how many processes Accelerate's configuration divides each layer; 1 without tensor parallelism."""
    config = accelerator.parallelism_config
    return config.tp_size if config is not None else 1


class DataShare(NamedTuple):
    """The part of the rows that a process computes. Processes that divide a layer compute the same rows.

    Attributes:
        number: which part, from 0.
        parts: the number of parts.
    """

    number: int
    parts: int

    @classmethod
    def of(cls, accelerator: Accelerator) -> DataShare:
        """The share of this process."""
        size = tensor_parallel_size(accelerator)
        return cls(accelerator.process_index // size, accelerator.num_processes // size)


@contextmanager
def propagate_errors(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error of one process in all of them; otherwise the others would wait for that process forever.

    The code inside must not communicate with other processes.

    Raises:
        RecipeError: in the other processes, with the message of the error.
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


def disable_sharded_loading(accelerator: Accelerator) -> None:
    """Have transformers load whole models under ZeRO-3.

    Transformers would shard the weights while loading, but the adapter tests each attention layer with a forward pass
    when it is added, which needs whole weights.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()


def prepare_for_training(
    accelerator: Accelerator, model: Any, recipe: Recipe
) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Prepare a model and a new optimizer with Accelerate, with the extra steps that FSDP and DeepSpeed need.

    Returns:
        The prepared model, the prepared optimizer, and the PyTorch optimizer inside it.

    Raises:
        RecipeError: if FSDP cannot train the model with these settings.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, recipe)
    elif accelerator.distributed_type == DistributedType.FSDP:
        _make_ready_for_fsdp(accelerator, model)
    # On a CPU the fused kernel takes a quarter of the time. For the few parameters of an adapter that is nothing.
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    optimizer = new_optimizer(recipe, model, fused=alone and recipe.adapter["peft_type"] == "FULL")
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _register_prefixes(model)
        # `generate` reads this and keeps the processes in step.
        accelerator.state.deepspeed_plugin.set_deepspeed_weakref()
        return prepared, wrapped, optimizer
    initialize_optimizer_state(optimizer)
    if accelerator.distributed_type == DistributedType.FSDP and hasattr(model, "generate"):
        register_fsdp_forward_method(prepared, "generate")
        base = model
        while hasattr(base, "get_base_model"):  # there may be an adapter around an adapter
            base = base.get_base_model()
        base._is_fsdp_managed_module = True  # `generate` reads this and keeps the processes in step.
    return prepared, wrapped, optimizer


def initialize_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state for every parameter, as AdamW does with the first gradient.

    A checkpoint must contain the state of all parameters. Some may have had no gradient yet: a part of the model that
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
def gathered_parameters(parameters: Iterable[nn.Parameter], modified: bool = False) -> Iterator[None]:
    """Gather the parameters that ZeRO-3 has sharded; other parameters are unchanged.

    Args:
        parameters: the parameters.
        modified: whether the code inside writes to them; the values of the main process are kept.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modified else None):
        yield


def save_deepspeed_state(engine: Any, folder: Path) -> None:
    """Have every process write its shard of the trained weights and of the optimizer, in DeepSpeed's format."""
    names = set(trained_parameters(engine.module))

    def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        # `exclude_frozen_parameters` drops a tied weight under its first name only.
        for name in set(state) - names:
            del state[name]

    handle = engine.module.register_state_dict_post_hook(drop_frozen)
    try:
        engine.save_checkpoint(folder.parent, folder.name, save_latest=False, exclude_frozen_parameters=True)
    finally:
        handle.remove()


def _make_ready_for_fsdp(accelerator: Accelerator, model: Any) -> None:
    plugin = accelerator.state.fsdp_plugin
    buffers = sorted(set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if plugin.cpu_ram_efficient_loading and buffers:
        raise RecipeError(
            f"`fsdp_cpu_ram_efficient_loading`: Accelerate cannot send the buffers {', '.join(buffers)} to the other "
            "processes; set it to false."
        )
    dtypes = sorted({str(parameter.dtype) for parameter in trained_parameters(model).values()})
    if accelerator.mixed_precision == "no" and len(dtypes) > 1:
        raise RecipeError(
            f"`mixed_precision`: the trained parameters are {' and '.join(dtypes)}, which FSDP supports under mixed "
            "precision only: set it to bf16."
        )
    # By default Accelerate shards each of transformers' `_no_split_modules` as a unit. In BERT and similar models one
    # of them contains the input embeddings. Accelerate shards these too, and fails if they are sharded already.
    embeddings = model.get_input_embeddings()
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        without = {type(module).__name__ for module in model.modules() if embeddings not in module.children()}
        plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules or () if name in without]
    # Accelerate shards the output embeddings apart, and FSDP takes no weight that two parts share.
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    places = dict(model.named_parameters(remove_duplicate=False))
    for weight in () if output is None else output.parameters():
        shared = [name for name, each in places.items() if each is weight]
        if len(shared) > 1 and weight is not embeddings.weight:
            raise RecipeError(
                f"FSDP cannot divide this model: {join_names(shared)} are one weight, and Accelerate divides the "
                "output embeddings apart. Use DDP (examples/accelerate/ddp.yaml)."
            )
    for module in list(model.modules()):
        # Modules that share a weight must be sharded together. Accelerate handles the model's own embeddings; an
        # encoder and a decoder have further embedding modules with the same weight.
        for name, child in list(module.named_children()):
            if type(child) is type(embeddings) and child.weight is embeddings.weight:
                setattr(module, name, embeddings)
        # With `cpu_ram_efficient_loading` the parameters of the other processes are on the meta device. Accelerate
        # finds parameters in the optimizer by their address, so they need memory. The main process sends the values.
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
    """Have ZeRO-3 gather the prefix for the parent of each attention module, whose hooks read the prefix."""
    import deepspeed

    for layer in [module for module in model.modules() if isinstance(module, PrefixTuningV2Layer)]:
        attention = {id(target.module) for target in layer.targets}
        for parent in list(layer.model.modules()):
            if any(id(child) in attention for child in parent.children()):
                for parameter in layer.parameters():
                    deepspeed.zero.register_external_parameter(parent, parameter)
