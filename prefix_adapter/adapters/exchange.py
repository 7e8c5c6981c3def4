"""Import from and export to PEFT's PREFIX_TUNING and CARTRIDGE.

Both of PEFT's methods put the same prefix in front of attention. They differ in how it is trained: a CARTRIDGE has no
MLP, and its first tokens may be frozen. They and this package keep a table `[n, columns]` in the same order: layer by
layer, the key before the value, heads, head size. PEFT moves the positions of the input after the prefix, and its
encoder-decoders share columns between layers (`_untie_layers`). The base model is loaded in float32 and shows which
prefix it takes. Before anything is written, the outputs of PEFT and of this package are compared on it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbone.attention import PrefixSlot
from ..backbone.calls import forward_pre_hooks
from ..backbone.find import FoundTargets, find_cache_argument, find_targets
from ..config import PrefixTuningV2Config
from ..files.check import find_misfits
from ..files.contents import SAVED_ROOT, find_embeddings, names_ending_with, shapes_of
from ..files.whole import check_free, new_folder
from ..messages import shorten
from ..prefix.layer import PrefixTuningV2Layer
from ..prefix.names import LAYER_NAME
from ..prefix.slots import describe_slots
from .base_model import AUTO_CLASSES, BaseModelLoader, are_close, warn_of_window, with_root, write_adapter
from .saved import PREFIX_ROOT, AnyPath, SavedAdapter, open_adapter

# The names of a prompt method's tensors in a file of PEFT: the table, and the root of all others.
_TABLE = "prompt_embeddings"
_PROMPT_ROOT = "base_model."
_CONFIGS: dict[str, type[PrefixTuningConfig] | type[CartridgeConfig]] = {
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
}
PEFT_TYPES = tuple(_CONFIGS)


def import_peft(source: AnyPath, target: AnyPath, base_model: str | None = None) -> Path:
    """Convert a saved PREFIX_TUNING or CARTRIDGE adapter of PEFT, with its task head and other trained modules.

    The result is a table, because PEFT saves no MLP, with `prefix_dropout=0`, because PEFT has no dropout on a prefix.
    The frozen tokens of a CARTRIDGE stay frozen.
    In an encoder-decoder only the decoder's self-attention has a prefix.

    Args:
        source: The adapter's folder, or its name on the Hub.
        target: A folder that does not exist yet.
        base_model: The folder or Hub name of the base model; the one in the adapter's config if `None`.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If the adapter belongs to another method, a part is missing, unknown, not finite or of another
            shape, all tokens are frozen, or the base model takes no prefix or computes other outputs with PEFT.
        OSError: If the base model cannot be loaded.

    Example:
        ```python
        import_peft("peft-adapter", "ner")
        ```
    """
    target = check_free(target)
    saved: SavedAdapter[Any] = open_adapter(source, tuple(_CONFIGS.values()))
    theirs = saved.config
    frozen = getattr(theirs, "num_frozen_tokens", 0)
    if frozen >= theirs.num_virtual_tokens:
        raise ValueError(
            f"{source} has `num_frozen_tokens={frozen}` of {theirs.num_virtual_tokens}: no token could be trained. "
            "Write a smaller number into its adapter_config.json; the outputs do not depend on it."
        )
    _, weights = saved.read_weights()
    table = weights.pop(_TABLE, None)
    if table is None:
        raise ValueError(f"{source} has no {_TABLE}.")
    shape = (theirs.num_virtual_tokens, (theirs.num_layers or 0) * 2 * (theirs.token_dim or 0))
    if table.shape != shape:
        raise ValueError(f"{source}: {_TABLE} is {tuple(table.shape)}, while its own configuration says {shape}.")
    adapter = _Exchange.of(
        source, saved, {key.removeprefix(_PROMPT_ROOT): weights[key] for key in weights}, base_model
    )
    base: Any = adapter.load_base()
    found = find_targets(base)
    if theirs.num_transformer_submodules == 2:
        layers = sum(slot.kind == "decoder" for slot in _slots(found))
        table = _untie_layers(table, theirs.num_layers or 0, layers)
    config = PrefixTuningV2Config(
        task_type=adapter.loader.task,
        num_virtual_tokens=len(table),
        num_frozen_tokens=frozen,
        prefix_dropout=0.0,
        shift_positions=_has_positions(found),
        target_attention=["decoder"] if base.config.is_encoder_decoder else None,
        modules_to_save=theirs.modules_to_save,
        revision=theirs.revision,
    )
    parts = {"embedding.weight": table[frozen:]} | ({"frozen.weight": table[:frozen]} if frozen else {})
    weights = with_root(PREFIX_ROOT, parts) | with_root(SAVED_ROOT, adapter.head)
    model = adapter.loader.add_adapter(base, config, weights)
    outputs = _compute_outputs(model, adapter.loader.task)
    warn_of_window(base, "a prefix of PEFT")
    with new_folder(target) as folder:
        write_adapter(model, folder, adapter.base_name)
        del model, base, found  # one base model in memory at a time
        adapter.check_peft(lambda: PeftModel.from_pretrained(adapter.load_base(), str(source)), outputs)
    return target


def export_peft(
    source: AnyPath, target: AnyPath, base_model: str | None = None, peft_type: str = "PREFIX_TUNING"
) -> Path:
    """Convert a saved adapter into an adapter of PEFT, with its task head and other trained modules.

    An MLP becomes the table that it computes. `prefix_dropout` is lost, because PEFT has no dropout on a prefix.
    A PREFIX_TUNING adapter has no frozen tokens: all would be trained on.

    Args:
        source: The adapter's folder, or its name on the Hub.
        target: A folder that does not exist yet.
        base_model: The folder or Hub name of the base model; the one in the adapter's config if `None`.
        peft_type: PEFT's method: `"PREFIX_TUNING"` or `"CARTRIDGE"`. Both give the same outputs.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If `peft_type` is another method, or PEFT cannot express the adapter: another `entry_point` than
            the cache, `lora_r`, selected layers, a prefix in an encoder-decoder's encoder or cross-attention, layers
            of other shapes, unshifted positions, a task that PEFT does not have, or a base model that computes other
            outputs with PEFT.
        OSError: If the base model cannot be loaded.

    Example:
        ```python
        export_peft("ner", "peft-adapter")
        ```
    """
    target = check_free(target)
    if peft_type not in _CONFIGS:
        raise ValueError(f"`peft_type` must be one of {list(PEFT_TYPES)}, got {shorten(repr(peft_type))}.")
    saved = open_adapter(source, PrefixTuningV2Config)
    ours = saved.config
    if ours.entry_point != "cache":
        raise ValueError(
            f"{source} has `entry_point={ours.entry_point!r}`, and PEFT's prefix enters through the cache: train with "
            "`entry_point='cache'`, on a backbone whose attention takes one, for an adapter to export."
        )
    if ours.lora_r:
        raise ValueError(
            f"{source} has `lora_r={ours.lora_r}`, and PEFT's prefix tuning has no low-rank matrices beside the "
            "prefix: train with `lora_r=0` for an adapter to export."
        )
    _, weights = saved.read_weights()
    adapter = _Exchange.of(source, saved, {key.removeprefix(SAVED_ROOT): weights[key] for key in weights}, base_model)
    base: Any = adapter.load_base()
    model = PeftModel.from_pretrained(base, str(source))
    layer = getattr(base, LAYER_NAME)
    slots = _slots_for_peft(source, ours, layer)
    table = layer.encoder_of("default").fold()
    if adapter.loader.task == "SEQ_2_SEQ_LM":
        table = _tie_layers(source, table, len(slots))
    outputs = _compute_outputs(model, adapter.loader.task)
    if ours.task_type is None and getattr(base.config, "type_vocab_size", 0) > 1:
        raise ValueError(
            f"{source} answers questions with `token_type_ids`, which PEFT's model for question answering drops: its "
            "outputs would differ. Train with `task_type='QUESTION_ANS'` for an adapter to export."
        )
    warn_of_window(base, "a prefix of PEFT")
    del model, base, layer  # one base model in memory at a time
    config = _CONFIGS[peft_type](
        task_type=adapter.loader.task,
        num_virtual_tokens=ours.num_virtual_tokens,
        num_layers=len(slots),
        token_dim=slots[0].shape.key_columns,
        num_attention_heads=slots[0].shape.key_heads,
        modules_to_save=ours.modules_to_save,
        revision=ours.revision,
    )
    if isinstance(config, CartridgeConfig):
        config.num_frozen_tokens = ours.num_frozen_tokens
    weights = {_TABLE: table, **with_root(_PROMPT_ROOT, adapter.head)}
    peft_model = adapter.loader.add_adapter(adapter.load_base(), config, weights)
    adapter.check_peft(lambda: peft_model, outputs)
    with new_folder(target) as folder:
        write_adapter(peft_model, folder, adapter.base_name)
    return target


@dataclass
class _Exchange:
    """A saved adapter that is converted, without its prefix.

    Attributes:
        source: Its folder or Hub name, for messages.
        loader: The loader of its base model.
        base_name: The name of the base model in the new adapter's config.
        head: The tensors of its trained modules, by their names in the base model.
        embeddings: The base model's embeddings, if the adapter has them.
    """

    source: AnyPath
    loader: BaseModelLoader
    base_name: str
    head: dict[str, Tensor]
    embeddings: dict[str, Tensor]

    @classmethod
    def of(
        cls, source: AnyPath, saved: SavedAdapter[Any], others: dict[str, Tensor], base_model: str | None
    ) -> _Exchange:
        """Find the task and the base model of an adapter.

        Args:
            source: Its folder or Hub name.
            saved: The opened adapter.
            others: Its tensors besides the prefix, by their names in the base model.
            base_model: The folder or Hub name of the base model; the one in its config if `None`.
        """
        config = saved.config
        name = base_model or config.base_model_name_or_path
        loader = BaseModelLoader(source, _task_of(source, saved), name, config.revision)
        # PEFT saves the embeddings of a resized vocabulary with an adapter.
        empty = loader.make_empty(loader.load_config())
        trained = names_ending_with(empty, config.modules_to_save or ())
        read, unread = find_embeddings(empty, trained=trained)
        embeddings = {key.replace(".original_module.", "."): others[key] for key in read if key in others}
        head = {key: tensor for key, tensor in others.items() if key not in read and key not in unread}
        return cls(source, loader, config.base_model_name_or_path or name, head, embeddings)

    def load_base(self) -> PreTrainedModel:
        """Load the base model, with as many labels as the trained head has.

        Raises:
            ValueError: If no number of labels fits the head, weights are missing, or the adapter has other embeddings
                than the base model.
        """
        misfits: list[str] = []
        # A head of several layers does not say which of them is its last.
        sizes = sorted({tensor.shape[0] for tensor in self.head.values() if tensor.dim()})
        for num_labels in sizes or (None,):
            config = self.loader.load_config(num_labels)
            empty = self.loader.make_empty(config)
            misfits = find_misfits(shapes_of(self.head), {}, shapes_of(empty.state_dict()))
            if not misfits:
                base, missing = self.loader.load(config)
                self.loader.check_complete(missing, self.head)
                self._check_embeddings(base)
                return base
        raise ValueError(
            f"{self.source} does not fit {type(empty).__name__} of {self.loader.name}: {'; '.join(misfits)}."
        )

    def _check_embeddings(self, base: PreTrainedModel) -> None:
        """Reject other embeddings than the base model's, because the new adapter has no embeddings."""
        own = base.state_dict()
        changed = [key for key, tensor in self.embeddings.items() if not are_close(own[key], tensor)]
        if changed:
            raise ValueError(
                f"{self.source} has embeddings of its own ({', '.join(changed)}), which differ from those of "
                f"{base.name_or_path}. Save the base model with these embeddings (`resize_token_embeddings`, load the "
                "adapter, `model.unload().save_pretrained(...)`), and give that folder as `base_model`."
            )

    def check_peft(self, make_model: Callable[[], PeftModel], outputs: dict[str, Tensor]) -> None:
        """Compare the outputs of PEFT's adapter with those of ours.

        Raises:
            ValueError: If they differ, or PEFT fails.
        """
        for name, value in _compute_peft_outputs(make_model, self.loader.task).items():
            gap = (outputs[name] - value).abs().max().item() if outputs[name].shape == value.shape else math.inf
            if not gap <= 1e-5 * max(1.0, value.abs().max().item()):
                raise ValueError(
                    f"{self.source} cannot be converted: on its base model, PEFT's prefix tuning computes other "
                    f"{name} than this package, by {gap:.1e}."
                )


def _task_of(source: AnyPath, saved: SavedAdapter[Any]) -> str:
    """Return PEFT's task type. An adapter of ours for question answering need not have one."""
    config, task = saved.config, saved.task_type
    model_class = (config.auto_mapping or {}).get("base_model_class", "")
    if task is None and isinstance(config, PrefixTuningV2Config) and model_class.endswith("ForQuestionAnswering"):
        task = "QUESTION_ANS"
    if task not in AUTO_CLASSES:
        raise ValueError(
            f"{source} has no task type that PEFT knows ({shorten(model_class or task)}), and without one PEFT's "
            "prefix tuning ignores the prefix."
        )
    return task


# ---- The layout of the prefix


def _slots(found: FoundTargets | PrefixTuningV2Layer) -> list[PrefixSlot]:
    return [slot for target in found.targets for slot in target.slots.values()]


def _has_positions(found: FoundTargets | PrefixTuningV2Layer) -> bool:
    """Whether the backbone has positions that a prefix could shift."""
    return bool(found.positions) or any(target.bias or target.shares_bias for target in found.targets)


def _untie_layers(table: Tensor, layers: int, wanted: int) -> Tensor:
    """Convert PEFT's table for an encoder-decoder into ours, for a decoder of `wanted` layers.

    PEFT (0.21, `PeftModel.get_prompt`) repeats the columns of its `layers` layers, gives each layer of the decoder the
    columns of two, and uses the first of them: layer l has the columns of layer 2l modulo `layers`.
    """
    parts = table.chunk(layers, dim=1)
    return torch.cat([parts[2 * layer % layers] for layer in range(wanted)], dim=1)


def _tie_layers(source: AnyPath, table: Tensor, layers: int) -> Tensor:
    """Invert `_untie_layers`; columns that PEFT does not use are zero.

    Raises:
        ValueError: If two layers that share columns in PEFT have different ones here.
    """
    tied: dict[int, Tensor] = {}
    for layer, part in enumerate(table.chunk(layers, dim=1)):
        if not torch.equal(tied.setdefault(2 * layer % layers, part), part):
            raise ValueError(
                f"{source}: PEFT gives layers {layer - layers // 2} and {layer} of a decoder of {layers} layers the "
                "same prefix (an even number of layers leaves half of its table unused). In this adapter they differ."
            )
    unused = torch.zeros_like(table.chunk(layers, dim=1)[0])
    return torch.cat([tied.get(layer, unused) for layer in range(layers)], dim=1)


def _slots_for_peft(source: AnyPath, config: PrefixTuningV2Config, layer: PrefixTuningV2Layer) -> list[PrefixSlot]:
    """Return the slots of an adapter.

    Raises:
        ValueError: If PEFT has no prefix for such slots.
    """
    slots = list(layer.adapters["default"].columns)
    base: Any = layer.model
    kind = "decoder" if base.config.is_encoder_decoder else slots[0].kind
    if {slot.kind for slot in slots} != {kind}:
        raise ValueError(
            f"{source} has a prefix in front of {describe_slots(slots)}. PEFT has one in front of self-attention "
            "only, in an encoder-decoder of the decoder's: train with `target_attention=['decoder']` for an adapter "
            "to export."
        )
    missing = [slot.layer for slot in _slots(layer) if slot.kind == kind and slot not in slots]
    if missing or layer.layers_without_prefix:
        raise ValueError(
            f"{source} has no prefix in front of layers {sorted({*missing, *layer.layers_without_prefix})}. PEFT has "
            "one in front of every layer."
        )
    shapes = {slot.shape for slot in slots}
    if len(shapes) > 1 or any((s.key_heads, s.key_size) != (s.value_heads, s.value_size) for s in shapes):
        raise ValueError(
            f"{source} was made for {describe_slots(slots)}. PEFT's prefix has one shape for the keys and values of "
            "all layers."
        )
    if config.strength != 1:
        raise ValueError(
            f"{source} has `strength={config.strength:g}`, and PEFT's prefix has no strength. Save it with "
            "`strength=1` for an adapter to export."
        )
    if not config.shift_positions and _has_positions(layer):
        raise ValueError(
            f"{source} leaves the positions of the input unchanged (`shift_positions=False`). PEFT lets them start "
            "after the prefix, so its outputs would differ: train with `shift_positions=True` for an adapter "
            "to export."
        )
    return slots


# ---- Outputs to compare


def _compute_outputs(model: nn.Module, task: str) -> dict[str, Tensor]:
    """Run a model on a few ordinary tokens, with two segments if the task's head reads segments."""
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


def _compute_peft_outputs(make_model: Callable[[], PeftModel], task: str) -> dict[str, Tensor]:
    """Run an adapter of PEFT on the same tokens.

    Raises:
        ValueError: If PEFT fails.
    """
    try:
        model = make_model()
        # PEFT's models for generation pass the cache under its old name, which transformers still accepts in a call.
        if _peft_works(model) or task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            return _compute_outputs(model, task)
        with _prompt_in_backbone(model):
            # PEFT's model for question answering drops token types.
            return _compute_outputs(model.get_base_model(), "FEATURE_EXTRACTION" if task == "QUESTION_ANS" else task)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"PEFT's own prefix tuning fails on the base model: {type(error).__name__}, {why}") from error


def _peft_works(model: PeftModel) -> bool:
    """Whether PEFT's own model classes can run the prefix; warn if not.

    peft 0.21 looks for an argument `past_key_values`, which is called `cache` from transformers 5.24 on: task heads
    raise an error, and `generate` silently returns the base model's tokens.
    """
    if "past_key_values" in inspect.signature(type(_backbone_of(model)).forward).parameters:
        return True
    warnings.warn(
        f"peft {peft.__version__} looks for `past_key_values`, which transformers {transformers.__version__} calls "
        "`cache`: with a task head a prefix of PEFT fails there, and `generate` ignores it. The adapter was "
        "compared without PEFT's task models. To run it with PEFT, use transformers below 5.24.",
        stacklevel=3,
    )
    return False


def _backbone_of(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base.base_model


@contextmanager
def _prompt_in_backbone(model: PeftModel) -> Iterator[None]:
    """Pass the keys and values of PEFT's adapter to the backbone, as PEFT's own forward does."""
    backbone = _backbone_of(model)
    argument: Any = find_cache_argument(backbone)

    def pass_prompt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        prompt = model.get_prompt(batch_size=len(mask))
        if not backbone.config.is_encoder_decoder:
            prompt_mask = mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens)
            kwargs["attention_mask"] = torch.cat([prompt_mask, mask], dim=1)
        return args, {**kwargs, argument: prompt}

    with forward_pre_hooks([(backbone, pass_prompt)]):
        yield
