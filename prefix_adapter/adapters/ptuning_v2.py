"""Import of checkpoints of THUDM/P-tuning-v2, the reference implementation.

Its prefix has the same layout as ours: a table `[n, columns]`, layer by layer, the key before the value, heads, head
size. The parts of its MLP have other names, and positions always start after the prefix. DeBERTa gets a cache there;
relative positions count from the first token of the input, and the prefix has no bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..backbone.attention import EntryPoint
from ..backbone.find import FoundTargets, find_targets
from ..backbone.find_attention import find_attention_targets
from ..backbone.unsupported import UnsupportedBackboneError
from ..config import PrefixTuningV2Config
from ..files.contents import SAVED_ROOT
from ..files.pickled import read_state_dict
from ..files.source import read_json, read_safetensors
from ..files.whole import check_free, new_folder
from ..messages import shorten
from .base_model import AUTO_CLASSES, BaseModelLoader, are_close, with_root, write_adapter
from .saved import PREFIX_ROOT, AnyPath

PTuningTask = Literal["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION"]

# The task heads of P-tuning-v2; FEATURE_EXTRACTION stands for the prefix without a head.
_HEADS = {
    "SEQ_CLS": "classifier",
    "TOKEN_CLS": "classifier",
    "QUESTION_ANS": "qa_outputs",
    "MULTIPLE_CHOICE": "classifier",
    "FEATURE_EXTRACTION": None,
}
# PEFT has no task type for multiple choice, and its model for question answering drops `token_type_ids`.
_TASKS_WITHOUT_TYPE = ("QUESTION_ANS", "MULTIPLE_CHOICE")
_ENCODER = "prefix_encoder."
# The parts of an encoder: their names there, and in our `PrefixEncoder`.
_ENCODER_NAMES = {
    "embedding.weight": "embedding.weight",
    "trans.0.weight": "hidden.weight",
    "trans.0.bias": "hidden.bias",
    "trans.2.weight": "output.weight",
    "trans.2.bias": "output.bias",
}
_CHECKPOINT_NAMES = ("model.safetensors", "pytorch_model.bin")


def import_ptuning_v2(
    source: AnyPath, target: AnyPath, base_model: str | None = None, task_type: PTuningTask | None = None
) -> Path:
    """Convert a checkpoint of [THUDM/P-tuning-v2](https://github.com/THUDM/P-tuning-v2) into an adapter.

    The prefix (a table, or the trained MLP) and the task head are converted. The adapter has `shift_positions=True` if
    the base model has positions to shift, and enters through the cache if the base model has one (BERT, RoBERTa), or
    else through attention (DeBERTa-v2 and v3). If the checkpoint has the frozen backbone too, it is compared with the
    base model.

    RoBERTa's head for sequence classification is there one linear layer after the backbone's pooler, which
    transformers' model does not have. Pooler and layer together are transformers' head.

    Args:
        source: The run's folder with `pytorch_model.bin` or `model.safetensors`, or one of these files.
        target: A folder that does not exist yet.
        base_model: The folder or Hub name of the frozen model; the one in the run's `config.json` if `None`.
        task_type: The task of the head; the one in the run's `config.json` if `None`. `"FEATURE_EXTRACTION"` converts
            the prefix without the head.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If the source is no checkpoint of a prefix, a part is missing, unknown, not finite or of another
            shape, or the base model is another one or takes no prefix.
        OSError: If the base model cannot be loaded.

    Example:
        ```python
        import_ptuning_v2("pytorch_model.bin", "ner", base_model="bert-base-cased", task_type="TOKEN_CLS")
        ```
    """
    target = check_free(target)
    weights, settings = _read_checkpoint(Path(source))
    prefix = _take_prefix(source, weights)
    task: Any = task_type or _task_of(settings)
    if task not in _HEADS:
        raise ValueError(f"`task_type`: {source} does not say what it was trained for. Choose out of {list(_HEADS)}.")
    loader = BaseModelLoader(source, task, base_model or settings.get("_name_or_path", ""))

    output = None if task == "MULTIPLE_CHOICE" else weights.get(f"{_HEADS[task]}.weight")
    base, missing = loader.load(loader.load_config(None if output is None else len(output)))
    head, modules = _take_head(source, weights, base, _HEADS[task])
    loader.check_complete(missing, head)
    hidden = prefix.get("hidden.weight")
    entry_point, found = _find_entry_point(base)
    # DeBERTa-v3 has no table of positions, only relative ones, and embeddings that take positions and do not use them.
    has_positions = entry_point == "cache" or any(position.movable for position in found.positions)
    config = PrefixTuningV2Config(
        task_type=None if task in _TASKS_WITHOUT_TYPE else task,
        num_virtual_tokens=len(prefix["embedding.weight"]),
        prefix_projection=hidden is not None,
        encoder_hidden_size=None if hidden is None else len(hidden),
        prefix_dropout=settings.get("hidden_dropout_prob", PrefixTuningV2Config.prefix_dropout),
        entry_point=entry_point,
        shift_positions=has_positions,
        modules_to_save=modules,
    )
    model = loader.add_adapter(base, config, with_root(PREFIX_ROOT, prefix) | with_root(SAVED_ROOT, head))
    with new_folder(target) as folder:
        write_adapter(model, folder, loader.name)
    return target


def _read_checkpoint(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a checkpoint, and the `config.json` beside it."""
    paths = [source / name for name in _CHECKPOINT_NAMES] if source.is_dir() else [source]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"{source} has no {' and no '.join(_CHECKPOINT_NAMES)}."
            if source.is_dir()
            else f"There is no file {source}."
        )
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    config = path.parent / "config.json"
    settings = read_json(config) if config.is_file() else {}
    types = {"architectures": list, "_name_or_path": str, "hidden_dropout_prob": (int, float)}
    for key, kind in types.items():
        if not isinstance(settings.get(key), (kind, type(None))):  # type: ignore[arg-type]
            raise ValueError(f"{config}: `{key}` is {shorten(settings[key])}.")
    broken = [key for key, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} has values that are not finite, in {shorten(', '.join(broken))}.")
    return weights, settings


def _task_of(settings: dict[str, Any]) -> str | None:
    """Return the task of a run by its model class (`BertPrefixForTokenClassification`, for instance)."""
    trained = str(next(iter(settings.get("architectures") or ()), ""))
    classes = {task: AUTO_CLASSES[task].removeprefix("AutoModel") for task, head in _HEADS.items() if head}
    return next((task for task, ending in classes.items() if trained.endswith(ending)), None)


def _take_prefix(source: AnyPath, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefix out of a checkpoint, by the names of its parts in a `PrefixEncoder`."""
    parts = {key.removeprefix(_ENCODER): weights.pop(key) for key in list(weights) if key.startswith(_ENCODER)}
    if not parts:
        raise ValueError(f"{source} has no {_ENCODER}embedding.weight: it is no checkpoint of P-tuning-v2's prefix.")
    if "weight" in parts:
        raise ValueError(
            f"{source} is a checkpoint of `--prompt`: embeddings in front of the input, not a prefix of each layer."
        )
    wanted = set(_ENCODER_NAMES) if len(parts) > 1 else {"embedding.weight"}
    if set(parts) != wanted:
        raise ValueError(
            f"{source}: the parts of {_ENCODER[:-1]} are {shorten(sorted(parts))}, where an MLP has "
            f"{sorted(_ENCODER_NAMES)} and a table its embedding.weight alone."
        )
    for key, tensor in parts.items():
        if tensor.dim() != (1 if key.endswith("bias") else 2):
            raise ValueError(f"{source}: {_ENCODER}{key} has {tensor.dim()} dimensions.")
    return {_ENCODER_NAMES[key]: tensor for key, tensor in parts.items()}


def _find_entry_point(base: PreTrainedModel) -> tuple[EntryPoint, FoundTargets]:
    """Return where a prefix enters a model, and the modules that take it: through the cache if there is one.

    Raises:
        UnsupportedBackboneError: If the model takes no prefix.
    """
    try:
        return "cache", find_targets(base)
    except UnsupportedBackboneError:
        return "attention", find_attention_targets(base)


def _take_head(
    source: AnyPath, weights: dict[str, Tensor], base: PreTrainedModel, name: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Take the trained tensors besides the prefix, by their names in transformers' model.

    Returns:
        The tensors, and the names of their modules.

    Raises:
        ValueError: If the checkpoint's backbone is not the base model's, or a part of its head is missing.
    """
    their_root = f"{base.base_model_prefix}."
    our_root = "" if base.base_model is base else their_root
    backbone = {
        our_root + key.removeprefix(their_root): tensor
        for key, tensor in weights.items()
        if key.startswith(their_root)
    }
    pooler = {key: tensor for key, tensor in backbone.items() if key.startswith(f"{our_root}pooler.")}
    own = base.state_dict()
    changed = [key for key, tensor in backbone.items() if key in own and not are_close(own[key], tensor)]
    if set(changed) - set(pooler):
        raise ValueError(
            f"{source} was trained on another base model than {base.name_or_path}, or its backbone was not frozen: "
            f"{len(changed)} of its tensors differ, {changed[0]} for one."
        )
    head = {key: tensor for key, tensor in weights.items() if not key.startswith(their_root)}
    if name is None:
        heads = tuple(f"{each}." for each in _HEADS.values() if each)
        unknown = next((key for key in head if not key.startswith(heads)), None)
        if unknown is not None:
            raise ValueError(
                f"{source} was trained on another base model than {base.name_or_path}: {type(base).__name__} has no "
                f"{shorten(unknown)}."
            )
        head = {}
    if f"{name}.out_proj.weight" in own and f"{name}.weight" in head:
        if not pooler:
            raise ValueError(
                f"{source}: P-tuning-v2's head of {type(base).__name__} reads the backbone's pooler, and that is not "
                "in the file. Take the file with the whole model, or the prefix alone (`task_type` "
                "FEATURE_EXTRACTION)."
            )
        parts = head | pooler
        roots = {f"{name}.": f"{name}.out_proj.", f"{our_root}pooler.": f"{name}."}
        head = {
            new + key.removeprefix(old): parts[key]
            for old, new in roots.items()
            for key in parts
            if key.startswith(old)
        }
    # If the base model's own checkpoint has no pooler, the run drew a random one, which the head depends on.
    return (head | pooler if changed else head), ([name] if name else []) + (["pooler"] if changed else [])
