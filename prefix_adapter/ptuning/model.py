"""P-Tuning v1 as a PEFT tuner, like LoRA: `get_peft_model` and `PeftModel` work with it unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..backbone.calls import ModuleCall
from ..tuner.model import AdapterModel
from .layer import PTuningLayer
from .names import LAYER_NAME, PREFIX


class PTuningModel(AdapterModel):
    """Virtual tokens anywhere in the input of a transformers model.

    P-Tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385). `peft.get_peft_model` and
    `PeftModel.from_pretrained` create it.

    Args:
        model (`PreTrainedModel`): The base model, with or without a task head.
        peft_config (`PTuningConfig`): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        *args: Further arguments of PEFT's `BaseTuner`.
        **kwargs: The same; with `low_cpu_mem_usage=True` the parameters are created on the meta device and loaded
            later.

    Raises:
        ValueError: If the model has no table of input embeddings or has one that tensor parallelism divides in hooks,
            or the configuration does not fit it.

    Example:
        ```python
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), PTuningConfig(num_virtual_tokens=6))
        model.base_model  # the PTuningModel
        ```
    """

    prefix = PREFIX
    tuner_layer_cls = PTuningLayer

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to `model`, as `AdapterModel.inject_adapter` does."""
        layer: PTuningLayer | None = getattr(model, LAYER_NAME, None)
        if layer is not None:
            layer.hooks.detach()  # PEFT copies embedding modules that are in `modules_to_save`
        super().inject_adapter(model, *args, **kwargs)
        self.layer.hooks.attach()

    def get_placeholder_ids(self, adapter_name: str = "default") -> list[int]:
        """The token ids in whose places the virtual tokens of an adapter stand.

        Args:
            adapter_name (`str`, defaults to `"default"`): The adapter.

        Returns:
            One id for each virtual token; or a single one that stands for all of them.

        Raises:
            ValueError: If there is no such adapter.
        """
        layer: PTuningLayer = self.layer
        if adapter_name not in layer.adapters:
            raise ValueError(f"There is no P-Tuning adapter {adapter_name!r}; there are {list(layer.adapters)}.")
        return list(layer.placeholders_of(adapter_name))

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Virtual tokens cannot be merged: they are inputs of the model, and no weight of it computes them. Keep "
            "the adapter beside the model; to make it small and fast use `fold_adapter`, to get the base model back "
            "`unload`."
        )

    def _new_layer(self, model: nn.Module, config: Any) -> PTuningLayer:
        return PTuningLayer(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this context around a forward. `adapter_names` names an adapter for each row of the batch."""
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            # `generate` of an encoder-decoder calls the encoder alone, and then the model with the encoder's outputs.
            # Other inputs are checked when the model is called: PEFT does not pass all of them here.
            given = {"input_ids": args[0] if args else kwargs.get("inputs"), **kwargs}
            has_inputs = any(given.get(name) is not None for name in ("input_ids", "inputs_embeds"))
            if has_inputs and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                layer: PTuningLayer = self.layer
                layer.hooks.check_inputs(ModuleCall([], (), {**given, "labels": None}), layer.get_rows())
            yield
