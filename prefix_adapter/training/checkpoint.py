"""Checkpoints: the trained weights and all state for exact resumption, written completely or not at all.

    checkpoints/step-000120/
      adapter_model.safetensors   the trained weights under PEFT's names, beside PEFT's configuration: a saved adapter
      second/                     a second adapter, with the same two files
      optimizer.safetensors       AdamW's moments
      state.json                  step, best step so far, schedule, random number generator states
      SHA256SUMS                  checksums of these files, in the format of `sha256sum`

Under DeepSpeed the folder `deepspeed`, with a file of each process, replaces the optimizer file.

For a model that is not a PEFT model, and for PEFT's prompt learning methods (which save another form than they train),
the weights are in `trained.safetensors` under the model's own names. A second adapter beside such a model is in the
folder `second`, as above. Frozen weights are never written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
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
from torch.distributed.fsdp import FSDPModule

from ..files.check import check_file
from ..files.contents import SAVED_ROOT, SECOND, TensorSpec
from ..files.whole import UNFINISHED, new_folder
from .distributed import gathered_parameters, save_deepspeed_state
from .files import fsync_path, path_in_errors
from .model import AdapterPart, adapter_parts, adapter_tensors, trained_parameters
from .recipe import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAME = re.compile(r"step-(\d{6,})$")
_WEIGHTS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
_DEEPSPEED, _SUMS, _CARD = "deepspeed", "SHA256SUMS", "README.md"
RESUME_FILES = (_OPTIMIZER, _STATE, _DEEPSPEED, _SUMS)
"""The files of a checkpoint that do not belong to a published adapter."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another run; the message names the file."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints / f"step-{step:06d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps with a complete checkpoint, in ascending order."""
    if not checkpoints.is_dir():
        return []
    found = (_NAME.match(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def _saved_names(model: nn.Module) -> dict[str, dict[str, str]]:
    """The name of each saved tensor in its file, by the model's name, for each file in the folder of a checkpoint."""
    own, files = list(adapter_tensors(model)), {}
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return {_WEIGHTS: {name: name for name in own}}
    # Each tensor is known by a number in its place. Under tensor parallelism PEFT copies the tensors.
    placeholders = {name: torch.tensor([number]) for number, name in enumerate(own)}
    for part in adapter_parts(model):
        saved = get_peft_model_state_dict(
            part.model, _names_in(part, placeholders), adapter_name=part.name, save_embedding_layers=False
        )
        folder = "" if part.name == "default" else f"{part.name}/"
        files[f"{folder}{SAFETENSORS_WEIGHTS_NAME}"] = {own[int(each)]: name for name, each in saved.items()}
    if adapter_parts(model)[0].name == SECOND:
        (words,) = files.values()
        files[_WEIGHTS] = {name: name.removeprefix(SAVED_ROOT) for name in own if name not in words}
    return files


def _names_in(part: AdapterPart, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that are in the PEFT model of one of its adapters, by their names there."""
    return {name.removeprefix(part.root): each for name, each in tensors.items() if name.startswith(part.root)}


def save_weights(model: nn.Module, weights: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write the trained weights of a model.

    Args:
        model: the model without Accelerate's wrapper.
        weights: the tensors of `adapter_tensors`, unsharded and on the CPU, by the model's names.
        folder: an existing folder.
    """
    files = _saved_names(model)
    if names := files.pop(_WEIGHTS, None):
        own = {saved: weights[name] for name, saved in names.items()}
        save_file(own, os.path.join(folder, _WEIGHTS), metadata={"format": "pt"})
    for part in adapter_parts(model) if files else ():
        part.model.save_pretrained(
            os.fspath(folder),
            selected_adapters=[part.name],  # by default PEFT saves the other one too, under names of this model
            state_dict=_names_in(part, weights),
            save_embedding_layers=False,
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the files of `save_weights` into a model, which may be sharded.

    Raises:
        CheckpointError: if a file is damaged or belongs to another model; the model is unchanged.
    """
    check_weights(model, folder)
    weights: dict[str, Any] = {}
    for file, names in _saved_names(model).items():
        contents = load_file(folder / file)
        weights |= {own: contents[saved] for own, saved in names.items()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # A forward may leave weights gathered, and torch cannot load into such weights.
    with gathered_parameters(trained_parameters(model).values(), modified=True):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def check_weights(model: nn.Module, folder: Path) -> None:
    """Check that the files of `save_weights` fit a model.

    Raises:
        CheckpointError: if a file is damaged, or its tensors are not the model's trained parameters.
    """
    tensors = adapter_tensors(model)
    for file, names in _saved_names(model).items():
        specs = {saved: TensorSpec.of(tensors[own]) for own, saved in names.items()}
        _check_tensors(folder / file, specs, model)


def _check_tensors(path: Path, needed: dict[str, TensorSpec], model: nn.Module) -> None:
    try:
        check_file(path, needed, {}, model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights and frozen rows, unsharded and on the CPU.

    If the model is sharded, only the main process receives the weights; the dictionary is empty in the others.
    """
    with gathered_parameters(trained_parameters(model).values()):
        gathered: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    # Leave out other buffers and the further names of tied weights.
    return {name: gathered[name].cpu() for name in adapter_tensors(model) if name in gathered}


def save(
    checkpoints: Path, step: int, accelerator: Accelerator, model: nn.Module, optimizer: Any, state: dict[str, Any]
) -> None:
    """Write a checkpoint; every process must call this function.

    The folder is renamed to its final name once all files are on the disk, so every folder with the name of a step is
    complete, even after a crash.

    Args:
        checkpoints: the folder of checkpoints.
        step: the optimizer step.
        accelerator: the accelerator.
        model: the model as Accelerate has prepared it.
        optimizer: the optimizer as Accelerate has prepared it.
        state: further JSON values for `state.json`.

    Raises:
        OSError: if the checkpoint cannot be written; earlier checkpoints are unchanged.
        FloatingPointError: if a weight or a moment is not finite; nothing is written.
    """
    unwrapped = accelerator.unwrap_model(model)
    weights = gather_weights(unwrapped)
    moments: Any = {}
    parts: Path | None = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        parts = checkpoints / f"{UNFINISHED}parts" / _DEEPSPEED
        save_deepspeed_state(model, parts)
    else:  # Like the weights, empty in all processes but the main one if sharded.
        moments = get_optimizer_state_dict(unwrapped, optimizer.optimizer, options=_GATHERED).get("state", {})
    generators = gather_object([_get_rng_states()])
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            for name, weight in weights.items():
                if not weight.isfinite().all():
                    raise FloatingPointError(f"some of the weights {name} are not finite")
            for name, own in moments.items():
                if not all(moment.isfinite().all() for moment in own.values()):
                    raise FloatingPointError(f"some of AdamW's moments of {name} are not finite")
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            contents = {**state, "step": step, "generators": generators, "scaler": scaler}
            _write(step_folder(checkpoints, step), unwrapped, weights, moments, parts, contents)
        except FloatingPointError as error:
            failure = error
        except OSError as error:
            failure = OSError(f"{error}. The checkpoint of step {step} was not written; earlier files are unchanged.")
    failures = [each for each in gather_object([failure]) if each]
    if failures:
        raise failures[0]


def _write(
    target: Path, model: nn.Module, weights: Any, moments: Any, parts: Path | None, state: dict[str, Any]
) -> None:
    with path_in_errors(target):
        with new_folder(target) as scratch:
            save_weights(model, weights, scratch)
            if parts:
                parts.rename(scratch / parts.name)
            else:
                flat = {f"{name}/{key}": own[key].contiguous() for name, own in moments.items() for key in own}
                save_file(flat, scratch / _OPTIMIZER)
            (scratch / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            files = sorted(path for path in scratch.rglob("*") if path.is_file() and path.name != _CARD)
            sums = [f"{_sha256(path)}  {path.relative_to(scratch).as_posix()}\n" for path in files]
            (scratch / _SUMS).write_text("".join(sums), encoding="utf-8")
            for path in scratch.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # safetensors creates files that only their owner can read.
                fsync_path(path)
            if target.exists():  # Written by a run that now resumes from an earlier step.
                _remove(target)
        fsync_path(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_others(checkpoints: Path, steps: set[int]) -> None:
    """Remove all checkpoints except those of `steps`, and the remains of unfinished ones.

    A checkpoint that cannot be removed, for instance because another process reads it on Windows, stays until the next
    call.
    """
    for path in list(checkpoints.iterdir()):
        match = _NAME.match(path.name)
        if match and int(match[1]) not in steps:
            with suppress(OSError):
                _remove(path)
        elif path.name.startswith(UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a folder with the name of a step is always complete."""
    scratch = path.with_name(UNFINISHED + path.name)
    shutil.rmtree(scratch, ignore_errors=True)
    path.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def find_intact(checkpoints: Path, accelerator: Accelerator, model: nn.Module, metric: str) -> int | None:
    """Find the last intact checkpoint, and warn if a later one is damaged; every process must call this function.

    Args:
        checkpoints: the folder of checkpoints.
        accelerator: the accelerator.
        model: the model.
        metric: the metric that chooses the best checkpoint.

    Returns:
        The step of the checkpoint; `None` if there are no checkpoints.

    Raises:
        CheckpointError: if there are checkpoints, but none is intact; the message names the damaged file.
        OSError: if a file cannot be read.
    """
    outcome: list[Any] = [None, []]
    if accelerator.is_main_process:
        outcome = _find_intact(checkpoints, model, metric)
    step, problems = broadcast_object_list(outcome)
    if isinstance(step, Exception):
        raise step
    if problems and step is None:
        raise CheckpointError(
            f"{problems[0]} No other checkpoint in {checkpoints} is intact: restore the file from a copy, or start "
            "the run again (--overwrite)."
        )
    if problems and accelerator.is_main_process:
        warnings.warn(f"{problems[0]} The run resumes from the intact checkpoint of step {step}.", stacklevel=2)
    return step


def _find_intact(checkpoints: Path, model: nn.Module, metric: str) -> list[Any]:
    problems = []
    for step in reversed(saved_steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        try:
            best = check(folder, model, metric)["best_step"]
            if best not in (None, step):  # The run saves these weights if no later step is better.
                check_sums(step_folder(checkpoints, best))
                check_weights(model, step_folder(checkpoints, best))
        except CheckpointError as error:
            problems.append(str(error))
        except OSError as error:
            return [error, []]
        else:
            return [step, problems]
    return [None, problems]


def check(folder: Path, model: nn.Module, metric: str | None = None) -> dict[str, Any]:
    """Check that a checkpoint matches its checksums and fits a model.

    Args:
        folder: the checkpoint.
        model: the model.
        metric: the metric that chooses the best checkpoint; not checked if `None`.

    Returns:
        The contents of `state.json`.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another run; the message names the file.
        OSError: if a file cannot be read.
    """
    check_sums(folder)
    state = load_state(folder, metric)
    check_weights(model, folder)
    if (folder / _DEEPSPEED).is_dir():
        return state
    moments: dict[str, TensorSpec] = {}
    for name, parameter in trained_parameters(model).items():
        moments |= {f"{name}/{key}": TensorSpec.of(parameter) for key in _MOMENTS}
        moments[f"{name}/step"] = TensorSpec((), torch.float32)
    path = folder / _OPTIMIZER
    _check_tensors(path, moments, model)
    for name, tensor in load_file(path).items():
        if name.endswith("/step") and tensor.item() not in range(state["step"] + 1):
            raise _damaged(path, f"{name} is {tensor.item():g} in the checkpoint of step {state['step']}")
        if name.endswith("/exp_avg_sq") and (tensor < 0).any():
            raise _damaged(path, f"{name}, a mean of squares, has negative values")
    return state


def check_sums(folder: Path) -> None:
    """Compare the files of a checkpoint with its checksums, if it has any: earlier versions wrote none.

    Raises:
        CheckpointError: if a file is missing or has another checksum.
        OSError: if a file cannot be read.
    """
    path = folder / _SUMS
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing.")
    if not path.exists():
        return
    for line in _read(path).splitlines():
        digest, _, name = line.partition("  ")
        if not name:
            raise _damaged(path, f"{line[:80]!r} is not a checksum and a file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing.")
        if _sha256(folder / name) != digest:
            raise _damaged(folder / name, f"its checksum differs from the one in {_SUMS}")


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}.")


def _read(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error


def load_state(folder: Path, metric: str | None = None) -> dict[str, Any]:
    """Read and check `state.json`: the `state` passed to `save`, the step and the random number generator states.

    Args:
        folder: the checkpoint.
        metric: the metric that must be among `best_metrics`; not checked if `None`.

    Raises:
        CheckpointError: if the file is missing or damaged.
        OSError: if the file cannot be read.
    """
    path = folder / _STATE
    try:
        state = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise _damaged(path, "it is not a JSON object")
    match = _NAME.match(folder.name)
    # The schedule counts every step, except those that a gradient scaler (fp16) or DeepSpeed skips.
    skips = state.get("scaler") is not None or (folder / _DEEPSPEED).is_dir()
    checks = {
        "step": lambda step: _is_count(step) and step > 0 and (match is None or step == int(match[1])),
        "best_step": lambda step: step is None or (_is_count(step) and 0 < step <= state["step"]),
        "best_metrics": lambda own: own is None if state["best_step"] is None else _is_metrics(own, metric),
        "evaluations_since_best": _is_count,
        "loss_sum": lambda value: _is_number(value) and math.isfinite(value),
        "loss_count": _is_count,
        "scheduler": lambda own: isinstance(own, dict) and _is_count(own.get("last_epoch")),
        "generators": lambda own: isinstance(own, list) and bool(own) and all(map(_is_rng_states, own)),
        "scaler": lambda own: own is None or isinstance(own, dict),
    }
    for key, good in checks.items():
        if key not in state:
            raise _damaged(path, f"it has no `{key}`")
        if not good(state[key]):
            raise _damaged(path, f"its `{key}` is invalid: {str(state[key])[:80]}")
    counted = state["scheduler"]["last_epoch"]
    if counted > state["step"] or (counted < state["step"] and not skips):
        raise _damaged(path, f"its schedule counts {counted} of {state['step']} steps")
    return state


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_metrics(value: Any, metric: str | None) -> bool:
    numbers = isinstance(value, dict) and all(map(_is_number, value.values()))
    return numbers and (metric is None or metric in value)


def _is_rng_states(states: Any) -> bool:
    """Whether these are valid states of random number generators."""
    try:
        read = _decode_rng_states(states)
        torch.Generator().set_state(read["cpu"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return False
    return True


def restore(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Load a checkpoint into a model and an optimizer that Accelerate has prepared.

    The random number generators are restored too, so nothing may draw random numbers between this call and training.

    Args:
        folder: the checkpoint, which must have passed `check`.
        accelerator: the accelerator.
        model: the model as Accelerate has prepared it.
        optimizer: the optimizer as Accelerate has prepared it.

    Returns:
        The contents of `state.json`.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        RecipeError: if the checkpoint was written under DeepSpeed and this run is not, or has another number of
            processes; or the reverse.
    """
    state = load_state(folder)
    generators = state["generators"]
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if (folder / _DEEPSPEED).is_dir() != deepspeed or (deepspeed and len(generators) != accelerator.num_processes):
        kind = "under DeepSpeed" if (folder / _DEEPSPEED).is_dir() else "without DeepSpeed"
        raise RecipeError(f"{folder} was written {kind} by {len(generators)} processes: resume it the same way.")
    if deepspeed:
        model.load_checkpoint(folder, _DEEPSPEED, load_module_strict=False, load_lr_scheduler_states=False)  # type: ignore[operator]
    else:
        _restore_weights_and_moments(folder, accelerator.unwrap_model(model), optimizer.optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if len(generators) == accelerator.num_processes:
        _set_rng_states(_decode_rng_states(generators[accelerator.process_index]), accelerator)
    else:
        accelerator.print(
            f"The checkpoint was written by {len(generators)} processes, and this run has "
            f"{accelerator.num_processes}: dropout will draw other numbers."
        )
    return state


def _restore_weights_and_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    load_weights(model, folder)
    moments: dict[str, Any] = {}
    for key, tensor in load_file(folder / _OPTIMIZER).items():
        name, _, part = key.rpartition("/")
        moments.setdefault(name, {})[part] = tensor
    # Restore only the moments; learning rates and other settings come from the recipe and the schedule.
    groups = get_optimizer_state_dict(model, optimizer, options=_GATHERED).get("param_groups")
    groups = gather_object([groups])[0]  # Only the main process receives them.
    contents: Any = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, contents, options=StateDictOptions(full_state_dict=True))


def _get_rng_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _decode_rng_states(states: dict[str, str]) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
        for name, text in states.items()
    }


def _set_rng_states(states: dict[str, Tensor], accelerator: Accelerator) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    elif torch.cuda.is_available() or "cuda" in states:
        accelerator.print("The checkpoint was written on another device type: dropout will draw other numbers.")
