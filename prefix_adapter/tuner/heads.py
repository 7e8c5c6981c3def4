"""Task heads and other `modules_to_save` in a model with prefixes: each row of a batch gets its own adapter's head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..private import find_outermost
from .running import AdapterCall


class PrefixAdapters(Protocol):
    """The part of `PrefixTuningV2Layer` that heads need."""

    @property
    def adapter_names(self) -> list[str]:
        """The names of all prefix adapters."""

    @property
    def current_call(self) -> AdapterCall | None:
        """The running call of this thread."""

    @property
    def active_sets(self) -> list[tuple[str, ...]]:
        """A single entry: the names of the active adapters."""


class PrefixHeadWrapper(ModulesToSaveWrapper):
    """PEFT's wrapper of a task head, in a model with prefixes.

    - In a mixed batch each row gets its own adapter's head. PEFT's wrapper does that for a few kinds of modules only,
      and only if all adapters and the active one have a head.
    - A call keeps the head with which it began, whatever another thread activates.
    - Beside an adapter of another method (LoRA), the head of one adapter stays active when the other adapter is
      activated. PEFT's wrapper would have no active adapter then, and use the base model's untrained head.

    Attributes:
        prefix_adapters: The model's prefix adapters, in a tuple: otherwise they would become a child module.
    """

    prefix_adapters: tuple[PrefixAdapters]

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Add an adapter's head.

        Raises:
            ValueError: If an adapter of another method has one. Only one of the two could be trained.
        """
        (adapters,) = self.prefix_adapters
        ours = adapter_name in adapters.adapter_names
        others = [name for name in self.modules_to_save if (name in adapters.adapter_names) != ours]
        if others and adapter_name not in self.modules_to_save:
            raise _two_heads_error(adapter_name, self, others[0])
        super().update(adapter_name, tied_module, **kwargs)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return the adapter whose head becomes active with `adapter_name`, as PEFT's wrapper does.

        The active head stays if it belongs to a method that `adapter_name` does not belong to.
        """
        (adapters,) = self.prefix_adapters
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        active = next(iter(self.active_adapters), None)
        absent = not any(name in self.modules_to_save for name in names)
        if (
            active is not None
            and absent
            and {name in adapters.adapter_names for name in names} == {active not in adapters.adapter_names}
        ):
            return active
        return super().check_set_adapter(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the head of each row, or the active adapter's; the arguments are those of the head.

        Heads may have different numbers of labels (in an `AdapterPool`). The logits that a row's own head does not
        have are `-inf`.
        """
        (adapters,) = self.prefix_adapters
        call = adapters.current_call
        if call is None or (call.names is None and call.adapters == adapters.active_sets):
            return super().forward(*args, **kwargs)
        heads = [self._get_head(names) for names in call.adapters]
        if all(head is heads[0] for head in heads):
            return heads[0](*args, **kwargs)
        states, *rest = args
        head_of_rows = [head for head in heads for _ in range(states.shape[0] // len(heads))]
        outputs: dict[int, Tensor] = {}
        for head in dict.fromkeys(head_of_rows):
            rows = [row for row, own in enumerate(head_of_rows) if own is head]
            outputs |= dict(zip(rows, head(states[rows], *rest, **kwargs), strict=True))
        width = max(output.shape[-1] for output in outputs.values())
        padded = [F.pad(out, (0, width - out.shape[-1]), value=-torch.inf) for _, out in sorted(outputs.items())]
        return torch.stack(padded)

    def _get_head(self, adapter_names: tuple[str, ...]) -> nn.Module:
        (adapters,) = self.prefix_adapters
        names = [*adapter_names, *(name for name in self.active_adapters if name not in adapters.adapter_names)]
        heads = self.modules_to_save
        return next((heads[name] for name in names if name in heads), self.original_module)


def find_head_wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """PEFT's wrappers of `modules_to_save` and the like in a model."""
    return find_outermost(model, AuxiliaryTrainingWrapper)


def adopt_heads(model: nn.Module, adapters: PrefixAdapters) -> None:
    """Turn PEFT's wrappers of `modules_to_save` into `PrefixHeadWrapper`."""
    for head in find_head_wrappers(model):
        if type(head) is ModulesToSaveWrapper:
            head.__class__ = PrefixHeadWrapper
            vars(head)["prefix_adapters"] = (adapters,)


def check_one_head(model: nn.Module, adapters: PrefixAdapters, adapter_name: str, endings: Iterable[str]) -> None:
    """Check that no adapter of another method has a head where a new prefix adapter brings one.

    Args:
        model: The model.
        adapters: Its prefix adapters.
        adapter_name: The new adapter.
        endings: The `modules_to_save` of its config.

    Raises:
        ValueError: If there is one.
    """
    endings = tuple(endings)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and endings and name.endswith(endings):
            others = [other for other in module.modules_to_save if other not in adapters.adapter_names]
            if others:
                raise _two_heads_error(adapter_name, module, others[0])


def remove_heads(model: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Remove an adapter's heads from PEFT's wrappers, and wrappers that have no other adapter's head.

    Args:
        model: The model.
        adapter_name: The adapter.
        active: The adapters that are to be active afterwards.
    """
    wrappers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
    for parent, name, wrapper in wrappers:
        if set(wrapper.modules_to_save) <= {adapter_name}:
            setattr(parent, name, wrapper.original_module)
        else:
            own = wrapper.active_adapters
            wrapper.delete_adapter(adapter_name, (active if adapter_name in own else own) or None)


def _two_heads_error(adapter_name: str, head: ModulesToSaveWrapper, other: str) -> ValueError:
    return ValueError(
        f"Adapter {adapter_name!r} brings a head ({type(head.original_module).__name__}) that adapter {other!r} of "
        "another PEFT method has already, and only one could be in effect. Leave out `task_type` and "
        "`modules_to_save` in one of their configurations."
    )
