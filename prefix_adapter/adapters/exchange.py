"""Adapters from and to other implementations of prefix tuning: THUDM/P-tuning-v2, and PEFT's PREFIX_TUNING.

All of them keep a table `[n, columns]` in the same order (layer by layer, the key before the value, heads, head size),
all but ours move the positions of the input behind the prefix. What differs is said where it is dealt with. The base
model is loaded, in float32: its attention says which prefix it takes, and PEFT's outputs and ours are compared on it
before anything is written.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..backbone.attention import PrefixSlot
from ..backbone.find import FoundTargets, find_cache_argument, find_targets
from ..config import PrefixTuningV2Config
from ..files.check import SAVED, find_embeddings, read_weights
from ..files.pickled import read_state_dict
from ..files.source import Source, read_json, read_safetensors
from ..messages import shorten
from ..prefix.layer import PrefixTuningV2Layer
from ..prefix.names import LAYER_NAME, PREFIX
from ..prefix.slots import describe_slots
from .saved import check_free, load_config, new_folder

AnyPath = str | os.PathLike[str]
PTuningTask = Literal["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION"]

# What a name in a state dict begins with in PEFT, not `SAVED`, where the method is one of prompts.
_PEFTS = "base_model."
_TABLE = "prompt_embeddings"
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# P-tuning-v2's heads by task; FEATURE_EXTRACTION stands for the prefix alone.
_HEADS = {
    "SEQ_CLS": "classifier",
    "TOKEN_CLS": "classifier",
    "QUESTION_ANS": "qa_outputs",
    "MULTIPLE_CHOICE": "classifier",
    "FEATURE_EXTRACTION": None,
}
# PEFT has no task type for multiple choice, and one for question answering that drops `token_type_ids`.
_UNNAMED = ("QUESTION_ANS", "MULTIPLE_CHOICE")
_PTUNING = "prefix_encoder."
_PTUNING_NAMES = {
    "embedding.weight": "embedding.weight",
    "trans.0.weight": "hidden.weight",
    "trans.0.bias": "hidden.bias",
    "trans.2.weight": "output.weight",
    "trans.2.bias": "output.bias",
}
# What configurations call the tokens that a layer looks back at.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")


def import_ptuning_v2(
    source: AnyPath, target: AnyPath, base_model: str | None = None, task_type: PTuningTask | None = None
) -> Path:
    """Make an adapter of what a run of [THUDM/P-tuning-v2](https://github.com/THUDM/P-tuning-v2) has saved.

    The prefix (a table, or the MLP as it was trained) and the task head are carried over; positions are shifted as
    there. Where the checkpoint has the backbone too, which was frozen, it is compared with the base model.

    RoBERTa's head for sequence classification is a linear layer behind the backbone's pooler there, which
    transformers' model does not have; pooler and layer together are transformers' head.

    Args:
        source: the run's folder with `pytorch_model.bin` or `model.safetensors`, or such a file.
        target: a folder that does not exist yet.
        base_model: the frozen model's folder or name on the Hub; what the run's `config.json` says if `None`.
        task_type: what the head is for; what the run's `config.json` says if `None`. `"FEATURE_EXTRACTION"` takes the
            prefix alone, without the head.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: if `target` exists.
        ValueError: if something cannot be carried over: not a checkpoint of a prefix, parts that are missing,
            unknown, not finite or of another shape, another base model, or one that takes no prefix.
        OSError: if the base model cannot be loaded.
    """
    target = check_free(target)
    weights, settings = _read_checkpoint(Path(source))
    _check_finite(source, weights)
    prefix = _ptuning_prefix(source, weights)
    task: Any = task_type or _ptuning_task(settings)
    name = base_model or settings.get("_name_or_path")
    if task not in _HEADS:
        raise ValueError(f"`task_type`: {source} does not say what it was trained for. Choose out of {list(_HEADS)}.")
    if not name:
        raise ValueError(f"`base_model`: {source} does not say which model was frozen. Give its folder or name.")

    output = None if task == "MULTIPLE_CHOICE" else weights.get(f"{_HEADS[task]}.weight")
    base, missing = _load(task, name, _config(name, None if output is None else len(output)))
    head, modules = _ptuning_head(source, weights, base, _HEADS[task])
    _check_complete(source, task, name, missing, head)
    hidden = prefix.get("hidden.weight")
    config = PrefixTuningV2Config(
        task_type=None if task in _UNNAMED else task,
        num_virtual_tokens=len(prefix["embedding.weight"]),
        prefix_projection=hidden is not None,
        encoder_hidden_size=None if hidden is None else len(hidden),
        prefix_dropout=settings.get("hidden_dropout_prob", PrefixTuningV2Config.prefix_dropout),
        shift_positions=True,
        modules_to_save=modules,
    )
    model = get_peft_model(base, config)
    _put(source, model, {**_prefix_keys(prefix), **_under(SAVED, head)})
    with new_folder(target) as folder:
        _write(model, folder, name)
    return target


def import_peft(source: AnyPath, target: AnyPath, base_model: str | None = None) -> Path:
    """Make an adapter of a saved PREFIX_TUNING adapter of PEFT's, with its task head and other trained modules.

    It is a table: PEFT saves no MLP. PEFT has no dropout on a prefix, so `prefix_dropout` is 0. In an encoder-decoder
    the decoder's self-attention alone has a prefix.

    Args:
        source: an adapter's folder, or its name on the Hub.
        target: a folder that does not exist yet.
        base_model: where to load the base model from, if it is not where the adapter says.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: if `target` exists.
        ValueError: if something cannot be carried over: another method, parts that are missing, unknown, not finite or
            of another shape, a base model that takes no prefix, or one with which PEFT computes something else.
        OSError: if the base model cannot be loaded.
    """
    target = check_free(target)
    theirs = load_config(source, PrefixTuningConfig)
    weights = _read_adapter(source)
    task = _task_of(source, theirs)
    table = weights.pop(_TABLE, None)
    if table is None:
        raise ValueError(f"{source} has no {_TABLE}.")
    shape = (theirs.num_virtual_tokens, (theirs.num_layers or 0) * 2 * (theirs.token_dim or 0))
    if table.shape != shape:
        raise ValueError(f"{source}: {_TABLE} is {tuple(table.shape)}, while its own configuration says {shape}.")
    name = base_model or theirs.base_model_name_or_path
    head = {key.removeprefix(_PEFTS): tensor for key, tensor in weights.items()}
    words = _take_words(task, name, theirs, head)
    load = partial(_load_with_head, source, task, name, theirs.revision, head)
    base: Any = load()
    _check_words(source, base, words)
    found = find_targets(base)
    if theirs.num_transformer_submodules == 2:
        layers = sum(slot.kind == "decoder" for slot in _slots(found))
        table = _untied(table, theirs.num_layers, layers)
    config = PrefixTuningV2Config(
        task_type=task,
        num_virtual_tokens=len(table),
        prefix_dropout=0.0,
        shift_positions=_moves(found),
        target_attention=["decoder"] if base.config.is_encoder_decoder else None,
        modules_to_save=theirs.modules_to_save,
        revision=theirs.revision,
    )
    model = get_peft_model(base, config)
    _put(source, model, {**_prefix_keys({"embedding.weight": table}), **_under(SAVED, head)})
    outputs = _outputs(model, task)
    _warn_of_window(base)
    with new_folder(target) as folder:
        _write(model, folder, theirs.base_model_name_or_path or name)
        del model, base, found  # one base model in memory at a time
        peft_outputs = _peft_outputs(partial(PeftModel.from_pretrained, load(), str(source)), task)
        _check_equal(source, peft_outputs, outputs)
    return target


def export_peft(source: AnyPath, target: AnyPath, base_model: str | None = None) -> Path:
    """Make a PREFIX_TUNING adapter of PEFT's of a saved adapter, with its task head and other trained modules.

    An MLP becomes the table that it computes. PEFT has no dropout on a prefix: the setting is lost.

    Args:
        source: an adapter's folder, or its name on the Hub.
        target: a folder that does not exist yet.
        base_model: where to load the base model from, if it is not where the adapter says.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: if `target` exists.
        ValueError: if PEFT cannot express the adapter: chosen layers, a prefix in an encoder-decoder's encoder or
            cross-attention, layers of different shapes, positions that stay, a task that it does not know, or a base
            model with which it computes something else.
        OSError: if the base model cannot be loaded.
    """
    target = check_free(target)
    ours = load_config(source, PrefixTuningV2Config)
    weights = _read_adapter(source)
    task = _task_of(source, ours)
    name = base_model or ours.base_model_name_or_path
    head = {key.removeprefix(SAVED): tensor for key, tensor in weights.items() if f".{PREFIX}" not in key}
    words = _take_words(task, name, ours, head)
    load = partial(_load_with_head, source, task, name, ours.revision, head)
    base: Any = load()
    _check_words(source, base, words)
    model = PeftModel.from_pretrained(base, str(source))
    layer = getattr(base, LAYER_NAME)
    slots = _slots_for_peft(source, ours, layer)
    table = layer.encoder_of("default").fold()
    if task == "SEQ_2_SEQ_LM":
        table = _tied(source, table, len(slots))
    outputs = _outputs(model, task)
    if ours.task_type is None and getattr(base.config, "type_vocab_size", 0) > 1:
        raise ValueError(
            f"{source} answers questions with `token_type_ids`, which PEFT's model for question answering drops: its "
            "outputs would differ. Train with `task_type='QUESTION_ANS'` for an adapter to export."
        )
    _warn_of_window(base)
    del model, base, layer  # one base model in memory at a time
    config = PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=ours.num_virtual_tokens,
        num_layers=len(slots),
        token_dim=slots[0].shape.key_columns,
        num_attention_heads=slots[0].shape.key_heads,
        modules_to_save=ours.modules_to_save,
        revision=ours.revision,
    )
    peft_model = get_peft_model(load(), config)
    _put(source, peft_model, {_TABLE: table, **_under(_PEFTS, head)})
    _check_equal(source, _peft_outputs(lambda: peft_model, task), outputs)
    with new_folder(target) as folder:
        _write(peft_model, folder, ours.base_model_name_or_path or name)
    return target


# ---- Reading


def _read_checkpoint(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and the `config.json` beside it."""
    paths = [source / name for name in _CHECKPOINTS] if source.is_dir() else [source]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        absent = (
            f"{source} has no {' and no '.join(_CHECKPOINTS)}" if source.is_dir() else f"There is no file {source}"
        )
        raise ValueError(f"{absent}.")
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    config = path.parent / "config.json"
    settings = read_json(config) if config.is_file() else {}
    known = {"architectures": list, "_name_or_path": str, "hidden_dropout_prob": (int, float)}
    for key, kind in known.items():
        if not isinstance(settings.get(key), (kind, type(None))):  # type: ignore[arg-type]
            raise ValueError(f"{config}: `{key}` is {shorten(settings[key])}.")
    return weights, settings


def _read_adapter(source: AnyPath) -> dict[str, Tensor]:
    return read_weights(Source.of(source).weights())


def _check_finite(source: AnyPath, weights: dict[str, Tensor]) -> None:
    broken = [key for key, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} has values that are not finite, in {shorten(', '.join(broken))}.")


def _task_of(source: AnyPath, config: Any) -> str:
    """PEFT's task type, which for question answering and others an adapter of ours may not have named."""
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    model_class = (config.auto_mapping or {}).get("base_model_class", "")
    if task is None and isinstance(config, PrefixTuningV2Config) and model_class.endswith("ForQuestionAnswering"):
        task = "QUESTION_ANS"
    if task not in _AUTO_CLASSES:
        raise ValueError(
            f"{source} has no task type that PEFT knows ({shorten(model_class or task)}), and without one PEFT's "
            "prefix tuning leaves the prefix out."
        )
    return task


# ---- The base model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of a head that is missing, or has other labels: it is in the adapter."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _config(name: str, labels: int | None, revision: str | None = None) -> Any:
    with _quiet():
        settings = {} if labels is None else {"num_labels": labels}
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False, **settings)


def _load(task: str, name: str, config: Any, revision: str | None = None) -> tuple[PreTrainedModel, set[str]]:
    """The base model, the same at every call, and the names of what its own checkpoint has no weights for."""
    auto_class = getattr(transformers, _AUTO_CLASSES[task])
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, info = auto_class.from_pretrained(
                name,
                config=config,
                revision=revision or "main",
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise ValueError(f"`base_model`: {name!r} cannot be loaded as {_AUTO_CLASSES[task]}: {error}") from error
    return model, set(info["missing_keys"])


def _check_complete(source: AnyPath, task: str, name: str, missing: set[str], head: dict[str, Tensor]) -> None:
    """Refuse what would be drawn anew at every loading; of a bare backbone that is a pooler that nobody may read."""
    lost = sorted(missing - set(head))
    if lost and task != "FEATURE_EXTRACTION":
        raise ValueError(
            f"Neither {source} nor {name} has {', '.join(lost)}: outputs cannot be those of its training."
        )


def _load_with_head(
    source: AnyPath, task: str, name: str | None, revision: str | None, head: dict[str, Tensor]
) -> PreTrainedModel:
    """The base model, with as many labels as the head has that was trained.

    Raises:
        ValueError: if there is no model with such a head.
    """
    if not name:
        raise ValueError(f"`base_model`: {source} does not say which model was frozen. Give its folder or name.")
    gaps: list[str] = []
    # A head of several layers does not say which of them is its last.
    sizes = sorted({tensor.shape[0] for tensor in head.values() if tensor.dim()})
    for rows in sizes or (None,):
        config = _config(name, rows, revision)
        with torch.device("meta"):
            empty = getattr(transformers, _AUTO_CLASSES[task]).from_config(config)
        gaps = _gaps({key: empty.state_dict().get(key) for key in head}, head)
        if not gaps:
            base, missing = _load(task, name, config, revision)
            _check_complete(source, task, name, missing, head)
            return base
    raise ValueError(f"{source} has modules that do not fit {type(empty).__name__} of {name}: {'; '.join(gaps)}.")


def _take_words(task: str, name: str | None, config: Any, head: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the base model's embeddings out of what an adapter has besides its prefix; PEFT saves them with new words.

    Returns:
        The embeddings, by their names in the base model.
    """
    if not name:
        return {}  # loading the base model will say so
    with torch.device("meta"):
        empty = getattr(transformers, _AUTO_CLASSES[task]).from_config(_config(name, None, config.revision))
    endings = tuple(config.modules_to_save or ())
    trained = [key for key, _ in empty.named_modules() if endings and key.endswith(endings)]
    written, unread = find_embeddings(empty, trained=trained)
    for key in unread:
        head.pop(key, None)
    return {key.replace(".original_module.", "."): head.pop(key) for key in written if key in head}


def _check_words(source: AnyPath, base: PreTrainedModel, words: dict[str, Tensor]) -> None:
    """Refuse an adapter with embeddings of its own, as the adapter that is made of it has none.

    Raises:
        ValueError: if they are not the base model's.
    """
    known = base.state_dict()
    changed = [key for key, tensor in words.items() if not _are_equal(known[key], tensor)]
    if changed:
        raise ValueError(
            f"{source} has embeddings of its own ({', '.join(changed)}), for words that {base.name_or_path} does not "
            "have. Save the base model with these embeddings (`resize_token_embeddings`, load the adapter, "
            "`model.unload().save_pretrained(...)`), and give that folder as `base_model`."
        )


def _gaps(wanted: dict[str, Any], given: dict[str, Tensor]) -> list[str]:
    """What keeps tensors from being those that are wanted, in words."""
    gaps = [f"{key} is missing" for key in wanted if key not in given]
    for key, tensor in given.items():
        if wanted.get(key) is None:
            gaps.append(f"{shorten(key)} has no place")
        elif wanted[key].shape != tensor.shape:
            gaps.append(f"{key} is {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}")
    return gaps if len(gaps) <= 4 else [*gaps[:3], f"and {len(gaps) - 3} more"]


def _slots(found: FoundTargets | PrefixTuningV2Layer) -> list[PrefixSlot]:
    return [slot for target in found.targets for slot in target.slots.values()]


def _moves(found: FoundTargets | PrefixTuningV2Layer) -> bool:
    """Whether the backbone has positions that a prefix could move."""
    return bool(found.positions) or any(target.bias or target.shares_bias for target in found.targets)


# ---- P-tuning-v2


def _ptuning_task(settings: dict[str, Any]) -> str | None:
    """The task that a run's model class was for (`BertPrefixForTokenClassification`, for instance)."""
    trained = str(next(iter(settings.get("architectures") or ()), ""))
    classes = {task: _AUTO_CLASSES[task].removeprefix("AutoModel") for task, head in _HEADS.items() if head}
    return next((task for task, ending in classes.items() if trained.endswith(ending)), None)


def _ptuning_prefix(source: AnyPath, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefix out of a checkpoint, by the names that its parts have here."""
    given = {key.removeprefix(_PTUNING): weights.pop(key) for key in list(weights) if key.startswith(_PTUNING)}
    if not given:
        raise ValueError(f"{source} has no {_PTUNING}embedding.weight: it is no checkpoint of P-tuning-v2's prefix.")
    if "weight" in given:
        raise ValueError(
            f"{source} is one of `--prompt`: embeddings in front of the input, not a prefix of each layer."
        )
    wanted = set(_PTUNING_NAMES) if len(given) > 1 else {"embedding.weight"}
    if set(given) != wanted:
        raise ValueError(
            f"{source}: the parts of {_PTUNING[:-1]} are {shorten(sorted(given))}, where an MLP has "
            f"{sorted(_PTUNING_NAMES)} and a table its embedding.weight alone."
        )
    for key, tensor in given.items():
        if tensor.dim() != (1 if key.endswith("bias") else 2):
            raise ValueError(f"{source}: {_PTUNING}{key} has {tensor.dim()} dimensions.")
    return {_PTUNING_NAMES[key]: tensor for key, tensor in given.items()}


def _ptuning_head(
    source: AnyPath, weights: dict[str, Tensor], base: PreTrainedModel, name: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """What was trained besides the prefix, by the names that it has in transformers' model.

    Returns:
        The tensors, and the names of the modules that have them.

    Raises:
        ValueError: if the checkpoint's backbone is not the base model's, or a part of its head is missing.
    """
    theirs = f"{base.base_model_prefix}."
    ours = "" if base.base_model is base else theirs
    backbone = {ours + key.removeprefix(theirs): tensor for key, tensor in weights.items() if key.startswith(theirs)}
    pooler = {key: tensor for key, tensor in backbone.items() if key.startswith(f"{ours}pooler.")}
    known = base.state_dict()
    changed = [key for key, tensor in backbone.items() if key in known and not _are_equal(known[key], tensor)]
    if set(changed) - set(pooler):
        raise ValueError(
            f"{source} was trained on another base model than {base.name_or_path}, or its backbone was not frozen: "
            f"{len(changed)} of its tensors differ, {changed[0]} for one."
        )
    head = {key: tensor for key, tensor in weights.items() if not key.startswith(theirs)} if name else {}
    if f"{name}.out_proj.weight" in known and f"{name}.weight" in head:
        if not pooler:
            raise ValueError(
                f"{source}: P-tuning-v2's head of {type(base).__name__} reads the backbone's pooler, and that is not "
                "in the file. Take the one with the whole model, or the prefix alone (`task_type` FEATURE_EXTRACTION)."
            )
        places = {f"{name}.": f"{name}.out_proj.", f"{ours}pooler.": f"{name}."}
        parts = head | pooler
        head = {
            new + key.removeprefix(old): parts[key]
            for old, new in places.items()
            for key in parts
            if key.startswith(old)
        }
    # Where the base's own checkpoint has no pooler, the run drew one and kept it.
    return (head | pooler if changed else head), ([name] if name else []) + (["pooler"] if changed else [])


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.to(other.dtype), other)


# ---- PEFT


def _untied(table: Tensor, layers: int, wanted: int) -> Tensor:
    """A table of PEFT's for an encoder-decoder, in our order, for a decoder of `wanted` layers.

    PEFT (0.21, `PeftModel.get_prompt`) repeats the columns of its `layers` layers, and gives each layer of the decoder
    those of two, of which the first is used: layer l has 2l modulo `layers`.
    """
    parts = table.chunk(layers, dim=1)
    return torch.cat([parts[2 * layer % layers] for layer in range(wanted)], dim=1)


def _tied(source: AnyPath, table: Tensor, layers: int) -> Tensor:
    """The inverse of `_untied`; columns that PEFT does not use are zero.

    Raises:
        ValueError: if two layers that have the same columns there have different ones here.
    """
    placed: dict[int, Tensor] = {}
    for layer, part in enumerate(table.chunk(layers, dim=1)):
        if not torch.equal(placed.setdefault(2 * layer % layers, part), part):
            raise ValueError(
                f"{source}: PEFT gives layers {layer - layers // 2} and {layer} of a decoder of {layers} layers the "
                "same prefix (an even number of layers leaves half of its table unused). This adapter's differ."
            )
    unused = torch.zeros_like(table.chunk(layers, dim=1)[0])
    return torch.cat([placed.get(place, unused) for place in range(layers)], dim=1)


def _slots_for_peft(source: AnyPath, config: PrefixTuningV2Config, layer: PrefixTuningV2Layer) -> list[PrefixSlot]:
    """The slots of an adapter, if they are such as PEFT's have.

    Raises:
        ValueError: if not.
    """
    slots = list(layer.adapters["default"].columns)
    base: Any = layer.model
    kind = "decoder" if base.config.is_encoder_decoder else slots[0].kind
    if {slot.kind for slot in slots} != {kind}:
        raise ValueError(
            f"{source} has a prefix in front of {describe_slots(slots)}. PEFT has one in front of self-attention "
            "alone, in an encoder-decoder of the decoder's: train with `target_attention=['decoder']` for an adapter to export."
        )
    missing = [slot.layer for slot in _slots(layer) if slot.kind == kind and slot not in slots]
    if missing or layer.layers_without_prefix:
        raise ValueError(
            f"{source} has no prefix in front of layers {sorted({*missing, *layer.layers_without_prefix})}. PEFT has one in "
            "front of every layer."
        )
    shapes = {slot.shape for slot in slots}
    if len(shapes) > 1 or any((s.key_heads, s.key_size) != (s.value_heads, s.value_size) for s in shapes):
        raise ValueError(
            f"{source} was made for {describe_slots(slots)}. PEFT's prefix has one shape for the keys and "
            "values of all layers."
        )
    if not config.shift_positions and _moves(layer):
        raise ValueError(
            f"{source} leaves the positions of the input as they are (`shift_positions=False`). PEFT lets them start "
            "behind the prefix, so its outputs would differ: train with `shift_positions=True` for an adapter to "
            "export."
        )
    return slots


def _outputs(model: nn.Module, task: str) -> dict[str, Tensor]:
    """What a model says to a few ordinary tokens, of two segments where a head is to read those."""
    config: Any = model.config
    text_config = config.get_text_config()
    ids = torch.arange(4).unsqueeze(0) + text_config.vocab_size // 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    elif task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and getattr(text_config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.tensor([[0, 0, 1, 1]])
    with torch.no_grad():
        output = model.eval()(**inputs)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _peft_outputs(make: Callable[[], PeftModel], task: str) -> dict[str, Tensor]:
    """What an adapter of PEFT's says to the same tokens."""
    try:
        model = make()
        # PEFT's models for generation pass the cache under its old name, which transformers still accepts in a call.
        if _peft_runs(model) or task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            return _outputs(model, task)
        with _prompt_in_backbone(model):
            # PEFT's model for question answering drops token types.
            return _outputs(model.get_base_model(), "FEATURE_EXTRACTION" if task == "QUESTION_ANS" else task)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"PEFT's own prefix tuning fails on the base model: {type(error).__name__}, {why}") from error


def _peft_runs(model: PeftModel) -> bool:
    """Whether PEFT itself can run its prefix; if not, say so.

    peft 0.21 looks for an argument called `past_key_values`, which is `cache` from transformers 5.24 on: task heads
    raise an error, and `generate` silently returns the base model's tokens.
    """
    if "past_key_values" in inspect.signature(type(_backbone_of(model)).forward).parameters:
        return True
    warnings.warn(
        f"peft {peft.__version__} looks for `past_key_values`, which transformers {transformers.__version__} calls "
        "`cache`: with a task head a PREFIX_TUNING adapter fails there, and `generate` ignores it. The adapter was "
        "compared without them. To run it with PEFT, use transformers below 5.24.",
        stacklevel=3,
    )
    return False


def _backbone_of(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base.base_model


@contextmanager
def _prompt_in_backbone(model: PeftModel) -> Iterator[None]:
    """Let the base model of an adapter of PEFT's have its keys and values, as PEFT's own forward passes them."""
    backbone = _backbone_of(model)
    argument: Any = find_cache_argument(backbone)

    def put_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        prompt = model.get_prompt(batch_size=len(mask))
        if not backbone.config.is_encoder_decoder:
            seen = mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens)
            kwargs["attention_mask"] = torch.cat([seen, mask], dim=1)
        return args, {**kwargs, argument: prompt}

    handle = backbone.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _check_equal(source: AnyPath, peft_outputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    for name, value in peft_outputs.items():
        gap = (outputs[name] - value).abs().max().item() if outputs[name].shape == value.shape else math.inf
        if not gap <= 1e-5 * max(1.0, value.abs().max().item()):
            raise ValueError(
                f"{source} cannot be carried over: tried out on its base model, PEFT's prefix tuning computes other "
                f"{name} than this package, by {gap:.1e}."
            )


def window_of(base: Any) -> int | None:
    """How many tokens some layers look back, if that is limited."""
    config = base.config.get_text_config()
    return next(filter(None, (getattr(config, name, None) for name in _WINDOWS)), None)


def _warn_of_window(base: PreTrainedModel) -> None:
    window = window_of(base)
    if window is not None:
        warnings.warn(
            f"{type(base).__name__} has layers that look back {window} tokens. A prefix of PEFT's falls out of that "
            "window, one of this package's does not: outputs are the same as long as prefix and input fit into it.",
            stacklevel=3,
        )


# ---- Writing


def _prefix_keys(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return _under(f"{SAVED}{LAYER_NAME}.{PREFIX}", parts)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _put(source: AnyPath, model: PeftModel, weights: dict[str, Tensor]) -> None:
    """Put an adapter's weights into a model, if they are those of its adapter."""
    _check_fits(source, model, weights)
    set_peft_model_state_dict(model, weights)


def _check_fits(source: AnyPath, model: PeftModel, weights: dict[str, Tensor]) -> None:
    gaps = _gaps(get_peft_model_state_dict(model, save_embedding_layers=False), weights)
    if gaps:
        raise ValueError(f"{source} does not fit {type(model.get_base_model()).__name__}: {'; '.join(gaps)}.")


def _write(model: PeftModel, folder: Path, name: str) -> None:
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = name
    # PEFT has added the names of heads to those that were there.
    config.modules_to_save = sorted(set(config.modules_to_save or ())) or None
    model.save_pretrained(str(folder), save_embedding_layers=False)
