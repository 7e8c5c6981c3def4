"""The layer of a method that keeps the parameters of all adapters in one child of the model."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..files.check import check_embeddings, check_file
from ..files.contents import SAVED_ROOT, TensorSpec, find_embeddings, find_heads, tensors_of
from ..private import clear_peft_marks, get_device
from .config import AdapterConfig
from .heads import remove_heads
from .labels import LabelNames
from .loading import PendingLoad
from .running import ActiveAdapter, AdapterCall, Row, RunningCalls

NAME_TAKEN = (
    "The model has an adapter {0!r} of another PEFT method already, and its configuration would be lost. Give this "
    "adapter another name."
)

InfoT = TypeVar("InfoT")


class AdapterLayer(nn.Module, BaseTunerLayer, Generic[InfoT]):
    """The parameters of all adapters of one method in a model, and the calls of the model that use them.

    The layer is a child of the model, so its parameters are saved, moved and frozen like any others. It is never
    called: hooks bring its values into the model.

    Attributes:
        noun: What an adapter of the method is, in messages.
        layer_name: The name of the child.
        prefix: PEFT's prefix of the method: the name of each container of parameters starts with it.
        config_class: The class of the method's configs.
        configs: The configs that PEFT keeps for the model, by adapter.

    Args:
        model: The transformers model.
    """

    noun: ClassVar[str]
    layer_name: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    other_param_names = ("_adapters", "_pending")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._adapters: dict[str, InfoT] = {}
        self._pending: dict[str, PendingLoad] = {}
        self._active_adapter: list[str] = []
        self.configs: dict[str, Any] = {}
        # PEFT's `disable_input_dtype_casting` sets this in every tuner layer. An adapter of ours has no input.
        self.cast_input_dtype_enabled = True
        self._labels = LabelNames(model)
        self._calls = RunningCalls()

    # ---- What each method does in its own way

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model that has the adapters."""

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any, on_meta: bool = False) -> None:
        """Add the parameters of a new adapter.

        Args:
            adapter_name: Its name.
            config: Its config.
            on_meta: Whether to create the parameters on the meta device, to be loaded later.

        Raises:
            ValueError: If the config, or the file of the adapter, does not fit the model. Nothing is changed then.
        """

    @abstractmethod
    def fold(self, adapter_name: str) -> None:
        """Replace an adapter's encoder by the table that it computes."""

    @abstractmethod
    def dropout_of(self, adapter_name: str) -> float:
        """The dropout probability that applies to an adapter now: 0 in eval mode."""

    @property
    @abstractmethod
    def home(self) -> Sequence[nn.Module]:
        """The modules whose device the parameters share, the first one that has a device."""

    def remove_hooks(self) -> None:
        """Remove all hooks from the model, and give its config the base model's own label names."""
        self._labels.show(None)

    def clear_plans(self) -> None:
        """Drop what was cached for the adapters that there were; called when adapters come or go."""

    # ---- Adapters

    @property
    def adapters(self) -> dict[str, InfoT]:
        """The adapters by name, without those whose weights are still to be read."""
        if not self._pending:
            return self._adapters
        pending = self.get_pending()
        return {name: adapter for name, adapter in self._adapters.items() if name not in pending}

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters, also of those whose weights are still to be read."""
        return list(dict.fromkeys([*self._adapters, *(name for part in self.containers for name in part)]))

    @property
    def containers(self) -> list[nn.ModuleDict]:
        """The modules of all adapters by adapter name, one container for each part of an adapter."""
        return [getattr(self, name) for name in self.adapter_layer_names]

    def modules_of(self, adapter_name: str) -> list[Any]:
        """The modules of an adapter, one for each container; `None` where it has none."""
        return [part[adapter_name] if adapter_name in part else None for part in self.containers]  # noqa: SIM401

    def parameters_of(self, adapter_name: str) -> list[Tensor]:
        """The parameters of an adapter."""
        modules = self.modules_of(adapter_name)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def match_buffers(self, adapter_name: str) -> None:
        """Give the buffers of an adapter the dtype of its parameters: PEFT casts parameters alone."""
        parameters = self.parameters_of(adapter_name)
        if not parameters:  # an adapter of another method, which PEFT loads through this model
            return
        for module in self.modules_of(adapter_name):
            if module is not None and not list(module.parameters()):
                module.to(parameters[0].dtype)

    def _check_file(
        self,
        adapter_name: str,
        config: AdapterConfig,
        parameters: Mapping[str, TensorSpec],
        hooked: Sequence[nn.Module] = (),
    ) -> dict[str, Tensor]:
        """Check `modules_to_save`, and the file of an adapter that is being loaded, before the model is changed.

        Args:
            adapter_name: The new adapter's name.
            config: Its config. There is no file to check if its `source` is `None`.
            parameters: The specs of its own parameters, by name.
            hooked: The modules that get a prefix, which PEFT must not copy.

        Returns:
            The embeddings of the base model that loading will write to, by name.

        Raises:
            ValueError: If the file does not fit, or `modules_to_save` names a module that cannot be saved.
        """
        containers = [f"{self.layer_name}.{name}" for name in self.adapter_layer_names]
        own = [self.layer_name, *containers, *(f"{name}.{adapter_name}" for name in containers)]
        heads = find_heads(self.model, config.modules_to_save or (), hooked, own, config.task_type)
        if config.source is None:
            return {}
        needed = {f"{SAVED_ROOT}{self.layer_name}.{self.prefix}{name}": spec for name, spec in parameters.items()}
        for name, head in heads.items():
            tensors = head.state_dict(keep_vars=True)
            needed |= {f"{SAVED_ROOT}{name}.{key}": TensorSpec.of(tensor) for key, tensor in tensors.items()}
        # PEFT saves the tensors of all methods that have an adapter of this name in one file.
        layer: nn.Module = self
        others = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m is not layer]
        found = tensors_of(self.model, adapter_name, others)
        allowed = {SAVED_ROOT + name.replace(f".{adapter_name}.", ".", 1): spec for name, spec in found.items()}
        embeddings, unread = find_embeddings(self.model, SAVED_ROOT, heads)
        path = config.source.find_weights()
        written = check_file(path, needed, allowed | unread, self.model, embeddings)
        if written and self.adapters:
            check_embeddings(path, self.model, heads, "the other adapters of this model")
        own_names = {name: name.removeprefix(SAVED_ROOT).replace(".original_module.", ".") for name in written}
        return {own_names[name]: tensor for name, tensor in written.items()}

    def _add(
        self,
        adapter_name: str,
        config: AdapterConfig,
        info: InfoT,
        modules: Sequence[nn.Module | None],
        home: nn.Module,
        dtype: torch.dtype,
        embeddings: dict[str, Tensor],
    ) -> None:
        """Add a new adapter whose config and file were checked.

        Args:
            adapter_name: Its name.
            config: Its config.
            info: The facts about it.
            modules: Its modules, one for each container.
            home: The module on whose device they are to be.
            dtype: Their dtype.
            embeddings: The embeddings of the base model that loading its file will write to, by name.
        """
        device = get_device(home)
        # As PEFT's other methods: a new adapter is in training mode, and so is one that is loaded to be trained.
        training = self.training or (config.source is not None and not config.inference_mode)
        for container, module in zip(self.containers, modules, strict=True):
            if module is not None:
                # PEFT's `low_cpu_mem_usage` creates modules on the meta device, and loads them later.
                place = None if any(parameter.is_meta for parameter in module.parameters()) else device
                container[adapter_name] = module.to(place, dtype).train(training)
        self._adapters[adapter_name] = info
        if config.source is not None:
            parameters = self.parameters_of(adapter_name)
            self._pending[adapter_name] = PendingLoad.begin(
                str(config.source), self.model, parameters, self.active_adapters, embeddings
            )
        self.clear_plans()
        config.source = None

    def _replace_modules(self, adapter_name: str, modules: Sequence[nn.Module | None]) -> None:
        """Replace the modules of an adapter."""
        for container, module in zip(self.containers, modules, strict=True):
            if module is not None:
                container[adapter_name] = module
            elif adapter_name in container:
                del container[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, PEFT chooses another one.

        Raises:
            RuntimeError: If a call that is still running uses the adapter.
        """
        self.check_unused(adapter_name)
        super().delete_adapter(adapter_name)
        self.clear_plans()

    def detach(self) -> None:
        """Remove the layer and its hooks from the model, and the marks of PEFT and transformers if none is left."""
        model = self.model
        if not getattr(model, "peft_config", {}):
            clear_peft_marks(model)
        self.remove_hooks()
        for name, child in list(model.named_children()):
            if child is self:
                delattr(model, name)

    # ---- Loading

    def get_pending(self) -> dict[str, PendingLoad]:
        """The adapters whose weights are still to be read, by name."""
        for name, load in list(self._pending.items()):
            if not load.ends_later:
                self.end_load(name)
        return self._pending

    def set_load_ends_later(self, adapter_name: str) -> None:
        """Note that an adapter's loading ends with `end_load`, and not as soon as its weights are there."""
        if adapter_name in self._pending:
            self._pending[adapter_name].ends_later = True

    def end_load(self, adapter_name: str) -> None:
        """Note that loading an adapter has ended, if its weights are there."""
        load = self._pending.get(adapter_name)
        if load is not None and load.has_weights(self.parameters_of(adapter_name)):
            self._pending.pop(adapter_name, None)

    def drop_failed_loads(self) -> None:
        """Remove the adapters that this thread began to load and that never received their weights."""
        for name, load in list(self.get_pending().items()):
            if not load.in_this_thread:
                continue
            self.drop_adapter(name)
            warnings.warn(
                f"Adapter {name!r} was removed: its weights were never read from {load.source}, because loading "
                "failed or was interrupted. Load it again. (`get_peft_model` makes a new adapter of a config that was "
                "read.)",
                stacklevel=2,
            )

    def drop_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model, loaded or not, with its heads. The last one takes the layer along.

        If this is interrupted, it can be called again.
        """
        model: Any = self.model
        load = self.get_pending().get(adapter_name)
        others = [name for name in self.adapter_names if name != adapter_name]
        active = [name for name in (load.active if load else self.active_adapters) if name in others]
        remove_heads(model, adapter_name, active)
        getattr(model, "peft_config", {}).pop(adapter_name, None)
        if others:
            if adapter_name in self.active_adapters:
                self.set_adapter(active or others[:1])
            self.delete_adapter(adapter_name)
        if load is not None:
            load.restore(model)
        if not others:
            self.detach()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after loading onto the meta device.
        device = device or next(filter(None, map(get_device, self.home)), None)
        if device is not None and device.type != "meta":
            for module in self.modules_of(adapter_name):
                if module is not None:
                    module.to(device)

    # ---- Active adapters and running calls

    def new_call(self, names: list[str] | None = None, strengths: float | list[float] | None = None) -> AdapterCall:
        """A call of the model, which keeps the adapters with which it begins.

        Args:
            names: An adapter's name for each row of the batch, `"__base__"` for none; `None` for the active adapters.
            strengths: The strength of the adapters in each row, or one for all rows; `None` for those of the call
                around this one, or else for each adapter's own.

        Raises:
            ValueError: If there are more or fewer strengths than names.
        """
        outer = self._calls.current
        if strengths is None and outer is not None:
            strengths = outer.strengths
        if names is not None and isinstance(strengths, list) and len(names) != len(strengths):
            raise ValueError(
                f"`adapter_names` has {len(names)} names, and `use_strength` has {len(strengths)} numbers."
            )
        adapters = self._get_adapters_of(names)
        rows = self._get_rows_of(adapters, strengths)
        return AdapterCall(names, strengths, adapters, rows, outer)

    def run(self, call: AdapterCall) -> AbstractContextManager[None]:
        """Inside this context, this thread is in a call of the model."""
        return self._calls.run(call)

    @property
    def current_call(self) -> AdapterCall | None:
        """The running call of this thread."""
        return self._calls.current

    @property
    def active_sets(self) -> list[tuple[str, ...]]:
        """A single entry: the names of the active adapters; none if adapters are disabled."""
        return self._get_adapters_of(None)

    def get_rows(self) -> list[Row]:
        """The adapters of each row in this thread; a single entry if all rows have the same."""
        call = self._calls.current
        return self._get_rows_of(self.active_sets) if call is None else call.rows

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does. Running calls of other threads keep theirs."""
        super().set_adapter(adapter_names, inference_mode)
        self._switch_calls()
        self._show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as PEFT does. Running calls of other threads keep theirs."""
        super().enable_adapters(enabled)
        self._switch_calls()
        self._show_labels()

    def check_unused(self, adapter_name: str) -> None:
        """Check that no running call, of any thread, uses an adapter that is about to be deleted.

        Raises:
            RuntimeError: If one does.
        """
        self._calls.check_unused(adapter_name)

    def _get_adapters_of(self, names: list[str] | None) -> list[tuple[str, ...]]:
        if self.disable_adapters:
            return [()]
        if names is not None:
            return [() if name == "__base__" else (name,) for name in names]
        return [tuple(name for name in self.active_adapters if name in self.adapters)]

    def _get_rows_of(self, adapters: list[tuple[str, ...]], strengths: float | list[float] | None = None) -> list[Row]:
        """The adapters of each row: those of strength 0 are left out, as if the adapter were not there."""

        def get_row(names: tuple[str, ...], given: float | None) -> Row:
            row = [ActiveAdapter(name, self._get_strength(name) if given is None else given) for name in names]
            return tuple(active for active in row if active.strength)

        if not isinstance(strengths, list):
            return [get_row(names, strengths) for names in adapters]
        if len(adapters) == 1:
            adapters = adapters * len(strengths)
        return [get_row(names, strength) for names, strength in zip(adapters, strengths, strict=True)]

    def _get_strength(self, adapter_name: str) -> float:
        """The strength of an adapter, where a call sets no other."""
        return 1.0

    def _switch_calls(self) -> None:
        for call in self._calls.list_of_thread():
            adapters = self._get_adapters_of(call.names)
            call.switch(adapters, self._get_rows_of(adapters, call.strengths))

    def keep_base_labels(self) -> None:
        """Leave the base model's own label names in its config, whichever adapter is active."""
        self._labels.keep_own()

    def _show_labels(self) -> None:
        """Show the label names of the active adapters, if they have the same ones."""
        active = [] if self.disable_adapters else self.active_adapters
        names = [getattr(self.configs.get(name), "label_names", None) for name in active]
        found = [each for each in names if each is not None]
        self._labels.show(found[0] if found and all(each == found[0] for each in found) else None)

    def begin_forward(self) -> list[Row]:
        """Prepare the layer for a forward, and return the adapters of each row.

        Raises:
            ValueError: If an adapter of another method was added under the name of an adapter of this method.
        """
        if self._pending and not torch.compiler.is_compiling():
            self.drop_failed_loads()
        rows = self.get_rows()
        for name in {name for row in rows for name, _ in row}:
            if name in self.configs and not isinstance(self.configs[name], self.config_class):
                # PEFT would not save the adapter.
                raise ValueError(NAME_TAKEN.format(name))
        return rows

    # ---- PEFT's tuner layer, where this layer differs from one around a base layer

    def unmerge(self) -> None:
        """Do nothing: an adapter of ours is never merged."""

    @property
    def weight(self) -> Tensor:
        """BaseTunerLayer looks for a base layer here, and would not stop."""
        raise AttributeError("This layer has no base layer, and so no weight of one.")

    @property
    def bias(self) -> Tensor:
        """As `weight`."""
        raise AttributeError("This layer has no base layer, and so no bias of one.")
