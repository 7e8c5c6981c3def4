"""The tuner of a method that keeps the parameters of all adapters in one child of the model.

PEFT calls it as it calls the tuner of LoRA: `get_peft_model` and `PeftModel` work with it unchanged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.dummy_inputs import count_codebooks
from ..files.check import check_tensors
from ..files.contents import find_embeddings, tensors_of
from ..messages import join_names
from ..private import compile_in_place, running_save_names, undo_compile_in_place
from .config import AdapterConfig
from .heads import adopt_heads, check_one_head, find_head_wrappers, remove_heads
from .layer import NAME_TAKEN, AdapterLayer
from .running import AdapterCall

# The task heads that PEFT adds to `modules_to_save` after it has created the tuner.
_PEFT_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class AdapterModel(BaseTuner):
    """The base of the tuners of this package: adapters whose parameters are in one `AdapterLayer`.

    Args:
        model (`PreTrainedModel`): The base model, with or without a task head.
        peft_config (`AdapterConfig`): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        *args: Further arguments of PEFT's `BaseTuner`.
        **kwargs: The same; with `low_cpu_mem_usage=True` the parameters are created on the meta device and loaded
            later.

    Raises:
        ValueError: If the configuration does not fit the model.
    """

    tuner_layer_cls: type[AdapterLayer[Any]]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        outer, model = model, compile_in_place(model)
        try:
            # First of all: PEFT reads the configs of other adapters from the model, and a failed load leaves one.
            self._drop_failed_loads(model)
            if isinstance(peft_config, dict):
                _prepare_task(model, peft_config[adapter_name])
            other_configs = getattr(model, "peft_config", None)
            # `inject_adapter_in_model` passes no dictionary, and keeps both configs.
            if isinstance(peft_config, dict) and self._is_taken(other_configs, adapter_name):
                if not isinstance(model, PeftModel):
                    raise ValueError(NAME_TAKEN.format(adapter_name))
                # Otherwise PEFT lets both tuners share one dictionary, and loses the other adapter's config.
                vars(self)["peft_config"] = {}
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            if self.peft_config is not other_configs and other_configs is not None:
                model.peft_config = other_configs
            elif isinstance(model, PeftModel):
                # PEFT saves in this order, and `_get_adapter_state_dict` must run before a file is written.
                others = {name: self.peft_config.pop(name) for name in list(self.peft_config) if name != adapter_name}
                self.peft_config.update(others)
        except BaseException:
            if outer is not model:
                undo_compile_in_place(model)
            raise

    @property
    def layer(self) -> Any:
        """The layer that holds the parameters of all adapters."""
        return getattr(self.model, self.tuner_layer_cls.layer_name)

    # ---- What each method does in its own way

    @abstractmethod
    def _new_layer(self, model: nn.Module, config: Any) -> AdapterLayer[Any]:
        """Make the layer for the first adapter of a model."""

    @abstractmethod
    def _check_merge_allowed(self) -> None:
        """Raise a ValueError: no adapter of this package can be merged into weights."""

    def _warn_of_layer(self, model: nn.Module, layer: Any) -> None:
        """Warn of parts of a model that get nothing from its first adapter."""

    # ---- Adapters

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
            UnsupportedBackboneError: If the model cannot take an adapter of this method.
            ValueError: If the configuration, or the file that is being loaded, does not fit the model.
        """
        config: Any = self.peft_config[adapter_name]
        name = self.tuner_layer_cls.layer_name
        first, layer, known = True, None, False
        try:
            self._drop_failed_loads(model)
            first = not hasattr(model, name)
            layer = self._new_layer(model, config) if first else getattr(model, name)
            known = adapter_name in layer.adapter_names
            check_one_head(model, layer, adapter_name, config.modules_to_save or ())
            layer.update_layer(adapter_name, config, low_cpu_mem_usage)
            layer.configs = self.peft_config
            if first:
                if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                    # PEFT freezes a base model only if it finds no tuner layer in it, and it will find this one.
                    model.requires_grad_(False)
                model.add_module(name, layer)
                self._warn_of_layer(model, layer)
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

        PEFT's own method searches all modules of the model. Here only the one layer and the heads matter.
        """
        # Another method may have added heads since the last switch.
        adopt_heads(self.model, self.layer)
        for module in [*find_head_wrappers(self.model), self.layer]:
            set_adapter(module, adapter_name, inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does.

        Raises:
            RuntimeError: If a call that is still running uses the adapter. Nothing is changed then.
            ValueError: If the adapter belongs to a PEFT model inside or around this one, or does not exist.
        """
        if adapter_name in self.peft_config and adapter_name not in self.layer.adapter_names:
            raise ValueError(
                f"Adapter {adapter_name!r} belongs to a PEFT model inside or around this one. Delete it there: the "
                "model inside is `model.get_base_model()`."
            )
        self.layer.check_unused(adapter_name)
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensors of an adapter that PEFT saves.

        Raises:
            ValueError: If loading the adapter failed, or if PEFT is about to save an adapter that `model` does not
                have itself.
        """
        if isinstance(model, PeftModel):
            check_own_adapters(model, [adapter_name, *running_save_names(model)])
        for module in model.modules():
            if isinstance(module, cls.tuner_layer_cls) and adapter_name in module.get_pending():
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
            if isinstance(module, cls.tuner_layer_cls) and isinstance(model, PeftModel):
                module.set_load_ends_later(adapter_name)
            if isinstance(module, (cls.tuner_layer_cls, ModulesToSaveWrapper)):
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
        self.layer.match_buffers(adapter_name)
        self.layer.end_load(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT puts task heads back with this method. Its own expects a head with one weight; RoBERTa's has several.
        setattr(parent, child_name, new_module)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("This method replaces no modules.")

    def fold_adapter(self, adapter_name: str = "default") -> None:
        """Replace an adapter's encoder by the table that it computes. Outputs stay the same, the file becomes small.

        The table can still be trained. To fold a saved adapter, see `prefix_adapter.fold`.

        Args:
            adapter_name (`str`, defaults to `"default"`): The adapter.

        Raises:
            ValueError: If there is no such adapter, or it is a table already.
        """
        if adapter_name not in self.layer.adapters:
            raise ValueError(
                f"There is no {self.layer.noun} adapter {adapter_name!r}; there are {list(self.layer.adapters)}."
            )
        config: Any = self.peft_config[adapter_name]
        if not config.has_encoder:
            raise ValueError(f"Adapter {adapter_name!r} is a table already (`{config.table_setting}`).")
        self.layer.fold(adapter_name)
        config.note_folded()

    def unmerge_adapter(self) -> None:
        """Do nothing: an adapter of this package is never merged."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for name in self.layer.adapters:
            self.layer.check_unused(name)
        names = self.layer.adapter_names
        self.layer.remove_hooks()
        delattr(self.model, self.tuner_layer_cls.layer_name)
        if isinstance(self.model, PeftModel):  # PEFT would remove its adapters too
            for name in names:
                config: Any = self.peft_config.pop(name)
                if config.modules_to_save:
                    remove_heads(self.model, name, [])
            return self.model
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    # ---- Calls

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this context around a forward. `adapter_names` names an adapter for each row of the batch."""
        layer, names = self.layer, kwargs.get("adapter_names")
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
        known = self.layer.adapters
        unknown = sorted({name for name in names if name != "__base__" and name not in known})
        if unknown:
            raise ValueError(f"`adapter_names` names {unknown}, but the adapters are {sorted(known)} and '__base__'.")
        if self.training or any(self.layer.dropout_of(name) for name in set(names) - {"__base__"}):
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
            call.check_row_count(given.shape[0], replica=self.model is not self.layer.model)
        return given is not None

    # ---- The model's other adapters

    def _drop_failed_loads(self, model: nn.Module) -> None:
        layer = getattr(model, self.tuner_layer_cls.layer_name, None)
        if layer is not None:
            layer.drop_failed_loads()

    def _is_taken(self, configs: Any, adapter_name: str) -> bool:
        """Whether one of the configs is that of another method's adapter with the name."""
        config = configs.get(adapter_name) if isinstance(configs, dict) else None
        return config is not None and not isinstance(config, self.tuner_layer_cls.config_class)


def nested_models(model: PeftModel) -> list[PeftModel]:
    """A PEFT model and those inside it, the innermost first."""
    inner = model.get_base_model()
    return [*(nested_models(inner) if isinstance(inner, PeftModel) else ()), model]


def own_adapters(model: PeftModel) -> list[str]:
    """The names of the adapters of a PEFT model, without those of PEFT models inside or around it.

    PEFT's `peft_config` has the adapters of all of them.
    """
    if isinstance(model.base_model, AdapterModel):
        names: list[str] = model.base_model.layer.adapter_names
        return names
    return [name for name, config in model.peft_config.items() if not isinstance(config, AdapterConfig)]


def check_own_adapters(model: PeftModel, names: list[str]) -> None:
    """Check that a PEFT model saves its own adapters alone.

    PEFT names a tensor by its place in the model that is saved. For an adapter of a model inside or around that one it
    is a name that fits no base model.

    Args:
        model: The PEFT model that is saved.
        names: The adapters that are saved.

    Raises:
        ValueError: If it does not.
    """
    own = own_adapters(model)
    others = set(names) - set(own)
    if others:
        raise ValueError(
            f"{join_names(others)} is no adapter of this PEFT model, but of one inside or around it, and would be "
            "saved under names that fit no base model. Save each adapter from its own model, and name it: "
            f"`model.save_pretrained(folder, selected_adapters={own})`, and the same for `model.get_base_model()`, "
            "the model inside. `prefix_adapter.push_to_hub(model, ...)` uploads the adapters of both."
        )


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
