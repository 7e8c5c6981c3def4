"""P-Tuning v2 as PEFT sees it: a tuner like LoRA, that `get_peft_model` and `PeftModel` work with as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .backbone.find import UnsupportedBackboneError
from .config import PrefixTuningV2Config
from .files.check import check_tensors
from .files.contents import find_embeddings, tensors_of
from .prefix.batch import Row, check_names
from .prefix.layer import LAYER_NAME, NAME_TAKEN, PREFIX, PrefixTuningV2Layer, in_place
from .prefix.rollback import drop_adapter, drop_unfinished

# Heads that PEFT names itself, after it has wrapped a model for the task.
_LATE_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class PrefixTuningV2Model(BaseTuner):
    """Puts learned keys and values in front of every attention layer of a frozen transformers model.

    P-Tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602). PEFT makes it, by way of `peft.get_peft_model` or
    `PeftModel.from_pretrained`.

    Args:
        model (`PreTrainedModel`): The frozen backbone, with or without a task head.
        peft_config (`PrefixTuningV2Config`): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`, *optional*): Create the parameters on the meta device, to be loaded later.

    Raises:
        UnsupportedBackboneError: if the backbone's attention cannot be given `past_key_values`.
        ValueError: if the configuration does not fit the backbone.
    """

    prefix = PREFIX
    tuner_layer_cls = PrefixTuningV2Layer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        # Before PEFT takes the configs that it finds in the model for those of adapters beside this one.
        outer, model = model, in_place(model)
        try:
            _drop_unfinished(model)
            if isinstance(peft_config, dict):
                _prepare_task(model, peft_config[adapter_name])
            theirs = getattr(model, "peft_config", None)
            # `inject_adapter_in_model` passes no dictionary, and keeps both.
            if isinstance(peft_config, dict) and _is_taken(theirs, adapter_name):
                if not isinstance(model, PeftModel):
                    raise ValueError(NAME_TAKEN.format(adapter_name))
                # PEFT would have both tuners share one dictionary, and lose the other's configuration.
                vars(self)["peft_config"] = {}
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            if self.peft_config is not theirs and theirs is not None:
                model.peft_config = theirs
        except BaseException:
            if outer is not model:
                model._compiled_call_impl = None
            raise

    @property
    def prefix_layer(self) -> PrefixTuningV2Layer:
        """The layer that holds all prefixes."""
        return getattr(self.model, LAYER_NAME)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to `model`; PEFT calls this for the first and for every further one."""
        config: Any = self.peft_config[adapter_name]
        first, layer, known = True, None, False
        try:
            _drop_unfinished(model)
            first = not hasattr(model, LAYER_NAME)
            layer = _new_layer(model) if first else getattr(model, LAYER_NAME)
            known = adapter_name in layer.adapter_names
            _check_heads(model, layer, adapter_name, config)
            layer.update_layer(adapter_name, config, low_cpu_mem_usage)
            layer.configs = self.peft_config
            if first:
                if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                    # PEFT freezes a base in which it finds no tuner layer yet, and will find this one.
                    model.requires_grad_(False)
                model.add_module(LAYER_NAME, layer)
                _warn_of_gaps(model, layer)
            # Those of other methods, before PEFT adds or activates one.
            adopt_heads(model, layer)
            # PEFT's own loop replaces no module of this method, and does the housekeeping.
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            adopt_heads(model, layer)
        except BaseException:
            if layer is not None and not known:
                drop_adapter(layer, adapter_name)
            # PEFT has noted the adapter before it was made.
            self.peft_config.pop(adapter_name, None)
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, which looks for a method's layers in all of the model: this one has one, and the heads."""
        # Another method may have added heads since.
        adopt_heads(self.model, self.prefix_layer)
        for module in [*_heads(self.model), self.prefix_layer]:
            set_adapter(module, adapter_name, inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's.

        Raises:
            RuntimeError: if a call that is still running has the adapter. Nothing is changed then.
        """
        self.prefix_layer.check_unused(adapter_name)
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """PEFT asks for this when it saves an adapter."""
        for module in model.modules():
            if isinstance(module, PrefixTuningV2Layer) and adapter_name in module.find_unfinished():
                raise ValueError(
                    f"Adapter {adapter_name!r} cannot be saved: loading it failed, so its weights are random. Load it "
                    f"again, or delete it with `model.delete_adapter({adapter_name!r})`."
                )
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT asks for this when it has read an adapter's weights: the last look at them before they are copied."""
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours, others = [], []
        for module in model.modules():
            if isinstance(module, PrefixTuningV2Layer) and isinstance(model, PeftModel):
                module.load_ends_later(adapter_name)
            if isinstance(module, (PrefixTuningV2Layer, ModulesToSaveWrapper)):
                ours.append(module)
            elif isinstance(module, BaseTunerLayer):
                others.append(module)
        needed, allowed = (tensors_of(model, adapter_name, layers) for layers in (ours, others))
        embeddings, unread = find_embeddings(model)
        check_tensors(renamed, needed, {**allowed, **unread}, model, embeddings)
        return renamed

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's, which calls it after it has made an adapter, and again as the last step of loading one."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.prefix_layer.finish(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT puts heads back with it, and expects a layer with a weight; RoBERTa's has several.
        setattr(parent, child_name, new_module)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A prefix replaces no modules.")

    def fold_adapter(self, adapter_name: str = "default") -> None:
        """Replace an adapter's MLP by the table that it computes: the same outputs, a few hundred KB when saved.

        It can still be trained, as a table. To fold an adapter that is already saved see `prefix_adapter.fold`.

        Raises:
            ValueError: if there is no such adapter, or it has no MLP.
        """
        if adapter_name not in self.prefix_layer.adapters:
            raise ValueError(
                f"There is no prefix adapter {adapter_name!r}; there are {list(self.prefix_layer.adapters)}."
            )
        config: Any = self.peft_config[adapter_name]
        if not config.prefix_projection:
            raise ValueError(f"Adapter {adapter_name!r} is a table already (`prefix_projection=False`).")
        self.prefix_layer.fold(adapter_name)
        config.prefix_projection, config.encoder_hidden_size = False, None

    def unmerge_adapter(self) -> None:
        """Do nothing, as PEFT's methods do for layers that are not merged: a prefix never is."""

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A prefix cannot be merged: its keys and values are inputs of attention, and no weight of the base model "
            "computes them. Keep the adapter beside the model; to make it small and fast use `fold_adapter`, to get "
            "the base model back `unload`."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for name in self.prefix_layer.adapters:
            self.prefix_layer.check_unused(name)
        self.prefix_layer.remove_hooks()
        delattr(self.model, LAYER_NAME)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around a forward: `adapter_names` gives every row of the batch an adapter of its own."""
        layer, names, count = self.prefix_layer, kwargs.get("adapter_names"), False
        if names is not None:
            names, count = self._check_adapter_names(names, args, kwargs)
            adopt_heads(self.model, layer)
        with layer.call_with(names, count):
            yield

    def _check_adapter_names(
        self, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[str], bool]:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`adapter_names` must be a list with a name for each row of the batch, got {names!r}.")
        if not names:
            raise ValueError("`adapter_names` has 0 names; it needs one for each row of the batch.")
        known = self.prefix_layer.adapters
        unknown = sorted({name for name in names if name != "__base__" and name not in known})
        if unknown:
            raise ValueError(f"`adapter_names` names {unknown}, but the adapters are {sorted(known)} and '__base__'.")
        if self.training or any(self.prefix_layer.dropout_of(name) for name in set(names) - {"__base__"}):
            raise ValueError("`adapter_names` is for inference: call `model.eval()`, or train one adapter at a time.")
        given = args[0] if args else None
        for name in ("input_ids", "inputs", "inputs_embeds"):
            given = kwargs.get(name) if given is None else given
        if given is not None:
            check_names(len(names), given.shape[0], replica=self.model is not self.prefix_layer.model)
        # Some of PEFT's models pass no inputs here: then the count is checked where the model is called.
        return list(names), given is None


def _new_layer(model: nn.Module) -> PrefixTuningV2Layer:
    try:
        return PrefixTuningV2Layer(model)
    except UnsupportedBackboneError as error:
        offloaded = any(hasattr(module, "_hf_hook") for module in model.modules()) or hasattr(model, "hf_device_map")
        if not offloaded or not any(parameter.is_meta for parameter in model.parameters()):
            raise
        # It is no matter of the backbone: PEFT removes the hooks that read the weights before it loads an adapter.
        raise ValueError(
            f"Weights of {type(model).__name__} are offloaded to the disk, and nothing reads them while an adapter is "
            "put in: `PeftModel.from_pretrained` cannot be used with such a base model. Load the base model anew, "
            "without offloading to the disk, or by `from_pretrained(..., device_map=...)` and then use "
            "`get_peft_model(base, PrefixTuningV2Config.from_pretrained(adapter))` and "
            "`set_peft_model_state_dict(model, load_peft_weights(adapter))`."
        ) from error


def _drop_unfinished(model: nn.Module) -> None:
    layer = getattr(model, LAYER_NAME, None)
    if layer is not None:
        drop_unfinished(layer)


def _is_taken(configs: Any, adapter_name: str) -> bool:
    """Whether an adapter of another method has the name."""
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    return config is not None and not isinstance(config, PrefixTuningV2Config)


def _prepare_task(model: nn.Module, config: Any) -> None:
    """Meet what PEFT's models for a task would stumble over when the adapter is in the model already."""
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type={config.task_type!s}` is for models that generate text, and {type(model).__name__} does not. "
            "Load one with its language-modelling head, or use the `task_type` of this one."
        )
    if config.source and config.task_type in _LATE_HEADS:
        config.modules_to_save = [*(config.modules_to_save or ()), *_LATE_HEADS[config.task_type]]


def _heads(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that PEFT keeps for each adapter."""
    found: list[nn.Module] = []
    pending = [model]
    # Not `modules()`: it remembers and names them all, and most of a switch would be that. The list grows underway.
    for module in pending:
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.append(module)
        elif module._modules:
            pending += [child for child in module._modules.values() if child is not None]
    return found


def _warn_of_gaps(model: nn.Module, layer: PrefixTuningV2Layer) -> None:
    """Say which attention and which layers of a model get no prefix."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "encoder" not in layer.kinds:
        warnings.warn(
            f"The encoder's attention in {name} cannot take a prefix; {sorted(layer.kinds)} attention gets one.",
            stacklevel=3,
        )
    if layer.layers_without:
        warnings.warn(
            f"Layers {layer.layers_without} of {name} keep no keys and values of their own (state-space, convolution, "
            "linear or shared attention) and get no prefix; the others do.",
            stacklevel=3,
        )


def _check_heads(model: nn.Module, layer: PrefixTuningV2Layer, adapter_name: str, config: Any) -> None:
    """Refuse a head of an adapter where an adapter of another method has one, before anything is changed.

    Raises:
        ValueError: if there is one.
    """
    endings = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and endings and name.endswith(endings):
            others = [other for other in module.modules_to_save if other not in layer.adapter_names]
            if others:
                raise _two_heads(adapter_name, module, others[0])


def _two_heads(adapter_name: str, head: ModulesToSaveWrapper, other: str) -> ValueError:
    return ValueError(
        f"Adapter {adapter_name!r} brings a head ({type(head.original_module).__name__}) that adapter {other!r} of "
        "another PEFT method has already, and only one could be in effect. Leave out `task_type` and "
        "`modules_to_save` in one of their configurations."
    )


def adopt_heads(model: nn.Module, layer: PrefixTuningV2Layer) -> None:
    """Make PEFT's wrappers of heads such as know of prefixes."""
    for head in _heads(model):
        if type(head) is ModulesToSaveWrapper:
            head.__class__ = PrefixHeadWrapper
            vars(head)["prefix_layer"] = (layer,)


class PrefixHeadWrapper(ModulesToSaveWrapper):
    """PEFT's wrapper of a task head, in a model with a prefix.

    - In a mixed batch each row gets its own adapter's head. PEFT's wrapper does so for a few kinds of modules, if all
      adapters have a head, and if the active one has.
    - A call keeps the head with which it began, whatever another thread activates.
    - Beside an adapter of another method (LoRA): the head of the one stays active when the other is activated. PEFT's
      wrapper would have no active adapter then, and take the base model's untrained head.
    """

    # In a tuple, or it would become a child.
    prefix_layer: tuple[PrefixTuningV2Layer]

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Add an adapter's head.

        Raises:
            ValueError: if an adapter of another method has one: only one of the two could be trained.
        """
        (layer,) = self.prefix_layer
        ours = adapter_name in layer.adapter_names
        others = [name for name in self.modules_to_save if (name in layer.adapter_names) != ours]
        if others and adapter_name not in self.modules_to_save:
            raise _two_heads(adapter_name, self, others[0])
        super().update(adapter_name, tied_module, **kwargs)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The head to activate, for names of adapters; `None` for the base model's."""
        (layer,) = self.prefix_layer
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        active = next(iter(self.active_adapters), None)
        absent = not any(name in self.modules_to_save for name in names)
        if (
            active is not None
            and absent
            and {name in layer.adapter_names for name in names} == {active not in layer.adapter_names}
        ):
            return active
        return super().check_set_adapter(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the head of each row gives, or the active adapter's; the arguments are those of the head.

        Heads may have different numbers of labels (in an `AdapterPool`): what a row's own does not have is `-inf`.
        """
        (layer,) = self.prefix_layer
        call = layer.call
        if call is None or (call.names is None and call.rows == layer.active_rows):
            return super().forward(*args, **kwargs)
        heads = [self._head_of(row) for row in call.rows]
        if all(head is heads[0] for head in heads):
            return heads[0](*args, **kwargs)
        states, *rest = args
        spread = [head for head in heads for _ in range(states.shape[0] // len(heads))]
        outputs: dict[int, Tensor] = {}
        for head in dict.fromkeys(spread):
            rows = [row for row, own in enumerate(spread) if own is head]
            outputs |= dict(zip(rows, head(states[rows], *rest, **kwargs), strict=True))
        width = max(output.shape[-1] for output in outputs.values())
        padded = [F.pad(out, (0, width - out.shape[-1]), value=-torch.inf) for _, out in sorted(outputs.items())]
        return torch.stack(padded)

    def _head_of(self, row: Row) -> nn.Module:
        (layer,) = self.prefix_layer
        names = [*row, *(name for name in self.active_adapters if name not in layer.adapter_names)]
        heads = self.modules_to_save
        return next((heads[name] for name in names if name in heads), self.original_module)
