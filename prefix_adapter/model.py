"""P-Tuning v2 as a PEFT tuner, like LoRA: `get_peft_model` and `PeftModel` work with it unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .backbone.attention import EntryPoint
from .backbone.dummy_inputs import count_codebooks
from .backbone.unsupported import UnsupportedBackboneError
from .config import PrefixTuningV2Config
from .files.check import check_tensors
from .files.contents import find_embeddings, tensors_of
from .messages import join_names
from .prefix.heads import adopt_heads, check_one_head, find_head_wrappers
from .prefix.layer import NAME_TAKEN, PrefixTuningV2Layer
from .prefix.names import LAYER_NAME, PREFIX
from .prefix.running import AdapterCall
from .private import compile_in_place, is_offloaded, undo_compile_in_place

# The task heads that PEFT adds to `modules_to_save` after it has created the tuner.
_PEFT_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class PrefixTuningV2Model(BaseTuner):
    """Learned keys and values in front of every attention layer of a frozen transformers model.

    P-Tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602). `peft.get_peft_model` and
    `PeftModel.from_pretrained` create it.

    Args:
        model (`PreTrainedModel`): The frozen backbone, with or without a task head.
        peft_config (`PrefixTuningV2Config`): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        *args: Further arguments of PEFT's `BaseTuner`.
        **kwargs: The same; with `low_cpu_mem_usage=True` the parameters are created on the meta device and loaded
            later.

    Raises:
        UnsupportedBackboneError: If the backbone's attention cannot receive `past_key_values`.
        ValueError: If the configuration does not fit the backbone.

    Example:
        ```python
        model = get_peft_model(AutoModel.from_pretrained(name), PrefixTuningV2Config(num_virtual_tokens=20))
        model.base_model  # the PrefixTuningV2Model
        ```
    """

    prefix = PREFIX
    tuner_layer_cls = PrefixTuningV2Layer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        outer, model = model, compile_in_place(model)
        try:
            # First of all: PEFT reads the configs of other adapters from the model, and a failed load leaves one.
            _drop_failed_loads(model)
            if isinstance(peft_config, dict):
                _prepare_task(model, peft_config[adapter_name])
            other_configs = getattr(model, "peft_config", None)
            # `inject_adapter_in_model` passes no dictionary, and keeps both configs.
            if isinstance(peft_config, dict) and _is_taken(other_configs, adapter_name):
                if not isinstance(model, PeftModel):
                    raise ValueError(NAME_TAKEN.format(adapter_name))
                # Otherwise PEFT lets both tuners share one dictionary, and loses the other adapter's config.
                vars(self)["peft_config"] = {}
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            if self.peft_config is not other_configs and other_configs is not None:
                model.peft_config = other_configs
        except BaseException:
            if outer is not model:
                undo_compile_in_place(model)
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
        """Add an adapter to `model`. PEFT calls this for the first adapter and for every further one.

        If this fails, the model is as it was before.

        Raises:
            UnsupportedBackboneError: If the backbone cannot take a prefix.
            ValueError: If the configuration, or the file that is being loaded, does not fit the backbone.
        """
        config: Any = self.peft_config[adapter_name]
        first, layer, known = True, None, False
        try:
            _drop_failed_loads(model)
            first = not hasattr(model, LAYER_NAME)
            layer = _new_layer(model, config.entry_point) if first else getattr(model, LAYER_NAME)
            known = adapter_name in layer.adapter_names
            check_one_head(model, layer, adapter_name, config.modules_to_save or ())
            layer.update_layer(adapter_name, config, low_cpu_mem_usage)
            layer.configs = self.peft_config
            if first:
                if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                    # PEFT freezes a base model only if it finds no tuner layer in it, and it will find this one.
                    model.requires_grad_(False)
                model.add_module(LAYER_NAME, layer)
                _warn_of_layers_without_prefix(model, layer)
            # Heads of other methods, before PEFT adds or activates one.
            adopt_heads(model, layer)
            # PEFT's loop finds no module to replace. It does the rest: dtypes, active adapters, frozen parameters.
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            adopt_heads(model, layer)
        except BaseException:
            if layer is not None and not known:
                layer.drop_adapter(adapter_name)
            # PEFT adds the config before it adds the adapter.
            self.peft_config.pop(adapter_name, None)
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter or adapters, as PEFT does.

        PEFT's own method searches all modules of the model. Here only the one prefix layer and the heads matter.
        """
        # Another method may have added heads since the last switch.
        adopt_heads(self.model, self.prefix_layer)
        for module in [*find_head_wrappers(self.model), self.prefix_layer]:
            set_adapter(module, adapter_name, inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does.

        Raises:
            RuntimeError: If a call that is still running uses the adapter. Nothing is changed then.
        """
        self.prefix_layer.check_unused(adapter_name)
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensors of an adapter that PEFT saves.

        Raises:
            ValueError: If loading the adapter failed.
        """
        for module in model.modules():
            if isinstance(module, PrefixTuningV2Layer) and adapter_name in module.get_pending():
                raise ValueError(
                    f"Adapter {adapter_name!r} cannot be saved: loading it failed, so its weights are random. Load it "
                    f"again, or delete it with `model.delete_adapter({adapter_name!r})`."
                )
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that PEFT has read, before it copies them into the model.

        Raises:
            ValueError: If they do not fit.
        """
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours, others = [], []
        for module in model.modules():
            if isinstance(module, PrefixTuningV2Layer) and isinstance(model, PeftModel):
                module.set_load_ends_later(adapter_name)
            if isinstance(module, (PrefixTuningV2Layer, ModulesToSaveWrapper)):
                ours.append(module)
            elif isinstance(module, BaseTunerLayer):
                others.append(module)
        needed, allowed = (tensors_of(model, adapter_name, layers) for layers in (ours, others))
        embeddings, unread = find_embeddings(model)
        check_tensors(renamed, needed, {**allowed, **unread}, model, embeddings)
        return renamed

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter's dtype. PEFT does this after it has created an adapter, and at the end of loading one."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.prefix_layer.end_load(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT puts task heads back with this method. Its own expects a head with one weight; RoBERTa's has several.
        setattr(parent, child_name, new_module)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A prefix replaces no modules.")

    def fold_adapter(self, adapter_name: str = "default") -> None:
        """Replace an adapter's MLP by the table that the MLP computes. Outputs stay the same, the file becomes small.

        The table can still be trained. To fold a saved adapter, see `prefix_adapter.fold`.

        Args:
            adapter_name (`str`, defaults to `"default"`): The adapter.

        Raises:
            ValueError: If there is no such adapter, or it has no MLP.
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
        """Do nothing: a prefix is never merged."""

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
        """PEFT enters this context around a forward. `adapter_names` names an adapter for each row of the batch."""
        layer, names = self.prefix_layer, kwargs.get("adapter_names")
        if names is not None:
            names = self._check_adapter_names(names)
            adopt_heads(self.model, layer)
        call = layer.new_call(names)
        if call.mixed:
            call.count_rows = not self._check_row_count(call, args, kwargs)
        with layer.run(call):
            yield

    def _check_adapter_names(self, names: Any) -> list[str]:
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
        return list(names)

    def _check_row_count(self, call: AdapterCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Compare the rows of a mixed batch with its names or strengths.

        Returns:
            Whether the inputs are known. Some of PEFT's models pass none. Then the rows are counted when the model is
            called.
        """
        given = args[0] if args else None
        for name in ("input_ids", "inputs", "inputs_embeds", str(getattr(self.model, "main_input_name", ""))):
            given = kwargs.get(name) if given is None else given
        # MusicGen has a row of token ids for each codebook.
        if given is not None and given.shape[0] != len(call.rows) * count_codebooks(self.model):
            call.check_row_count(given.shape[0], replica=self.model is not self.prefix_layer.model)
        return given is not None


def _new_layer(model: nn.Module, entry_point: EntryPoint) -> PrefixTuningV2Layer:
    try:
        return PrefixTuningV2Layer(model, entry_point)
    except UnsupportedBackboneError as error:
        if not is_offloaded(model) or not any(parameter.is_meta for parameter in model.parameters()):
            raise
        # The backbone is not the cause: PEFT removes the hooks that read weights before it loads an adapter.
        raise ValueError(
            f"Weights of {type(model).__name__} are offloaded to the disk, and nothing reads them while an adapter is "
            "put in: `PeftModel.from_pretrained` cannot be used with such a base model. Load the base model anew, "
            "without offloading to the disk, or by `from_pretrained(..., device_map=...)` and then use "
            "`get_peft_model(base, PrefixTuningV2Config.from_pretrained(adapter))` and "
            "`set_peft_model_state_dict(model, load_peft_weights(adapter))`."
        ) from error


def _drop_failed_loads(model: nn.Module) -> None:
    layer = getattr(model, LAYER_NAME, None)
    if layer is not None:
        layer.drop_failed_loads()


def _is_taken(configs: Any, adapter_name: str) -> bool:
    """Whether one of the configs is that of another method's adapter with the name."""
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    return config is not None and not isinstance(config, PrefixTuningV2Config)


def _prepare_task(model: nn.Module, config: Any) -> None:
    """Prepare a config for PEFT's model of its task, before the adapter is in the model.

    Raises:
        ValueError: If the model cannot do the task.
    """
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type={config.task_type!s}` is for models that generate text, and {type(model).__name__} does not. "
            "Load one with its language-modelling head, or use the `task_type` of this one."
        )
    if config.source and config.task_type in _PEFT_HEADS:
        config.modules_to_save = [*(config.modules_to_save or ()), *_PEFT_HEADS[config.task_type]]


def _warn_of_layers_without_prefix(model: nn.Module, layer: PrefixTuningV2Layer) -> None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "encoder" not in layer.kinds:
        warnings.warn(
            f"The encoder's attention in {name} cannot take a prefix; {sorted(layer.kinds)} attention gets one.",
            stacklevel=3,
        )
    if layer.layers_without_prefix:
        warnings.warn(
            f"Layers {layer.layers_without_prefix} of {name} keep no keys and values of their own (state-space, "
            "convolution, linear or shared attention) and get no prefix; the others do.",
            stacklevel=3,
        )
    if layer.plain_attention:
        warnings.warn(
            f"{join_names(layer.plain_attention)} of {name} compute attention themselves and get no prefix. The "
            "others do.",
            stacklevel=3,
        )
    if layer.unreached:
        warnings.warn(
            f"A forward pass of {name} on dummy inputs did not reach {join_names(layer.unreached)}: no prefix there. "
            "If these modules are to have one, give inputs that reach them: "
            "`with prefix_adapter.example_inputs(**batch): get_peft_model(...)`.",
            stacklevel=3,
        )
