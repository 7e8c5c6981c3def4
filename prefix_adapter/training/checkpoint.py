"""Checkpoints: the trained weights and what exact resumption needs, written whole or not at all.

    checkpoints/step-000120/
      adapter_model.safetensors   the trained weights under PEFT's names, beside PEFT's configuration: a saved adapter
      optimizer.safetensors       AdamW's moments
      state.json                  step, best step so far, schedule, random number generators' states

Under DeepSpeed the folder `deepspeed` with the processes' own files takes the optimizer's place.

Of a model that is no PEFT model (and of PEFT's prompt methods, whose saved form is not their trained one) the weights
are in `trained.safetensors` under the model's own names. Nothing frozen is ever written.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .distributed import save_parts, whole
from .model import trained
from .recipe import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAME = re.compile(r"step-(\d{6,})$")
_WEIGHTS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
_DEEPSPEED = "deepspeed"
NOT_THE_ADAPTER = (_OPTIMIZER, _STATE, _DEEPSPEED)
"""Files of a checkpoint that are for resuming only."""
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"step-{step:06d}"


def find(checkpoints: Path) -> list[int]:
    """The steps that there are whole checkpoints of, in order."""
    if not checkpoints.is_dir():
        return []
    found = (_NAME.match(entry.name) for entry in checkpoints.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _names(model: nn.Module) -> dict[str, str] | None:
    """PEFT's names in a file of the trained parameters' own; `None` where the file has the model's own names."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return None
    marks = {name: torch.empty(0) for name in trained(model)}
    own = {id(mark): name for name, mark in marks.items()}
    saved = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=False)
    return {own[id(mark)]: name for name, mark in saved.items()}


def save_weights(model: nn.Module, weights: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write the trained weights of a model.

    Args:
        model: the model, not wrapped by Accelerate.
        weights: its trained parameters, whole and on the CPU, by the model's names.
        folder: an existing folder.
    """
    if _names(model) is None:
        save_file(weights, os.path.join(folder, _WEIGHTS), metadata={"format": "pt"})
    else:
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)  # type: ignore[operator]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read what `save_weights` wrote into a model, which may be sharded."""
    names = _names(model)
    contents = load_file(folder / (_WEIGHTS if names is None else SAFETENSORS_WEIGHTS_NAME))
    weights: Any = contents if names is None else {own: contents[saved] for own, saved in names.items()}
    with whole(trained(model).values(), changed=True):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole and on the CPU; empty in other processes than the main one where they are sharded."""
    with whole(trained(model).values()):
        gathered: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    # What else there is are buffers, and other names of weights that are tied.
    return {name: gathered[name].cpu() for name in trained(model) if name in gathered}


def save(
    checkpoints: Path, step: int, accelerator: Accelerator, model: nn.Module, optimizer: Any, state: dict[str, Any]
) -> None:
    """Write a checkpoint; every process must call this.

    The folder gets its name when all is in it and on the disk: whenever the process dies, every folder that bears the
    name of a step is whole.

    Raises:
        OSError: if it cannot be written, with what was there before untouched.
        FloatingPointError: if a weight is not finite; nothing is written.
    """
    unwrapped = accelerator.unwrap_model(model)
    weights = gather_weights(unwrapped)
    moments: Any = {}
    parts: Path | None = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        parts = checkpoints / ".unfinished-parts" / _DEEPSPEED
        save_parts(model, parts)
    else:  # in other processes than the main one it is empty, as the weights are
        moments = get_optimizer_state_dict(unwrapped, optimizer.optimizer, options=_GATHERED).get("state", {})
    generators = gather_object([_generators()])
    failure: Exception | None = None
    if accelerator.is_main_process:
        broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
        try:
            if broken:
                raise FloatingPointError(f"some of the weights {broken[0]} are not finite")
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            contents = {**state, "step": step, "generators": generators, "scaler": scaler}
            _write(folder_of(checkpoints, step), unwrapped, weights, moments, parts, contents)
        except FloatingPointError as error:
            failure = error
        except OSError as error:
            text = f"{error}. The checkpoint of step {step} was not written; what was there before is untouched."
            failure = OSError(text)
    failures = [each for each in gather_object([failure]) if each]
    if failures:
        raise failures[0]


def _write(
    target: Path, model: nn.Module, weights: Any, moments: Any, parts: Path | None, state: dict[str, Any]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unfinished-"))
    try:
        save_weights(model, weights, scratch)
        if parts:
            parts.rename(scratch / parts.name)
        else:
            flat = {f"{name}/{key}": value.contiguous() for name, own in moments.items() for key, value in own.items()}
            save_file(flat, scratch / _OPTIMIZER)
        (scratch / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        for path in scratch.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors makes files that only their owner can read
            _to_disk(path)
        if target.exists():  # written by a run that stopped at this very step, and goes on from an earlier one
            _remove(target)
        scratch.rename(target)
        _to_disk(target.parent)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise OSError(f"{target}: {error}") from error  # safetensors has an error of its own for a full disk
        raise


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(checkpoints: Path, steps: set[int]) -> None:
    """Remove all checkpoints but those of `steps`, and what unfinished ones left."""
    for path in list(checkpoints.iterdir()):
        match = _NAME.match(path.name)
        if match and int(match[1]) not in steps:
            _remove(path)
        elif path.name.startswith(".unfinished-"):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It loses its name first: what bears the name of a step is whole."""
    scratch = path.with_name(f".unfinished-{path.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    path.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and the step."""
    return json.loads((folder / _STATE).read_text(encoding="utf-8"))


def restore(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Put a checkpoint into a model and an optimizer that Accelerate has prepared.

    The random number generators are put back too, so nothing that draws from them may come between this and training.

    Returns:
        What `save` was given as `state`, and the step.

    Raises:
        RecipeError: if it was written under DeepSpeed, and is not restored so by as many processes, or the reverse.
    """
    state = load_state(folder)
    generators = state["generators"]
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if (folder / _DEEPSPEED).is_dir() != deepspeed or (deepspeed and len(generators) != accelerator.num_processes):
        kind = "under DeepSpeed" if (folder / _DEEPSPEED).is_dir() else "without DeepSpeed"
        raise RecipeError(f"{folder} was written {kind} by {len(generators)} processes: resume it in the same way.")
    if deepspeed:
        model.load_checkpoint(folder, _DEEPSPEED, load_module_strict=False, load_lr_scheduler_states=False)  # type: ignore[operator]
    else:
        _restore_weights_and_moments(folder, accelerator.unwrap_model(model), optimizer.optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if len(generators) == accelerator.num_processes:
        _set_generators(generators[accelerator.process_index])
    else:
        accelerator.print(
            f"The checkpoint was written by {len(generators)} processes, and there are {accelerator.num_processes}: "
            "dropout will draw other numbers."
        )
    return state


def _restore_weights_and_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    load_weights(model, folder)
    moments: dict[str, Any] = {}
    for key, tensor in load_file(folder / _OPTIMIZER).items():
        name, _, part = key.rpartition("/")
        moments.setdefault(name, {})[part] = tensor
    # Rates and settings are the recipe's and the schedule's; only the moments are the optimizer's own.
    groups = get_optimizer_state_dict(model, optimizer, options=_GATHERED).get("param_groups")
    groups = gather_object([groups])[0]  # the main process alone is given them
    contents: Any = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, contents, options=StateDictOptions(full_state_dict=True))


def _generators() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_generators(states: dict[str, str]) -> None:
    read = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()
    }
    torch.set_rng_state(read["cpu"])
    if "cuda" in read and torch.cuda.is_available():
        torch.cuda.set_rng_state(read["cuda"])
