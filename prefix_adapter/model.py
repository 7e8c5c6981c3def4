"""P-Tuning v2 as a PEFT tuner, like LoRA: `get_peft_model` and `PeftModel` work with it unchanged."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .backbone.unsupported import UnsupportedBackboneError
from .messages import join_names
from .prefix.layer import PrefixTuningV2Layer
from .prefix.names import PREFIX
from .private import is_offloaded
from .tuner.model import AdapterModel


class PrefixTuningV2Model(AdapterModel):
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

    @property
    def prefix_layer(self) -> PrefixTuningV2Layer:
        """The layer that holds all prefixes."""
        layer: PrefixTuningV2Layer = self.layer
        return layer

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A prefix cannot be merged: its keys and values are inputs of attention, and no weight of the base model "
            "computes them. Keep the adapter beside the model; to make it small and fast use `fold_adapter`, to get "
            "the base model back `unload`."
        )

    def _new_layer(self, model: nn.Module, config: Any) -> PrefixTuningV2Layer:
        try:
            return PrefixTuningV2Layer(model, config.entry_point)
        except UnsupportedBackboneError as error:
            if not is_offloaded(model) or not any(parameter.is_meta for parameter in model.parameters()):
                raise
            # The backbone is not the cause: PEFT removes the hooks that read weights before it loads an adapter.
            raise ValueError(
                f"Weights of {type(model).__name__} are offloaded to the disk, and nothing reads them while an "
                "adapter is put in: `PeftModel.from_pretrained` cannot be used with such a base model. Load the base "
                "model anew, without offloading to the disk, or by `from_pretrained(..., device_map=...)` and then "
                "use `get_peft_model(base, PrefixTuningV2Config.from_pretrained(adapter))` and "
                "`set_peft_model_state_dict(model, load_peft_weights(adapter))`."
            ) from error

    def _warn_of_layer(self, model: nn.Module, layer: Any) -> None:
        name = type(model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "encoder" not in layer.kinds:
            warnings.warn(
                f"The encoder's attention in {name} cannot take a prefix; {sorted(layer.kinds)} attention gets one.",
                stacklevel=4,
            )
        if layer.layers_without_prefix:
            warnings.warn(
                f"Layers {layer.layers_without_prefix} of {name} keep no keys and values of their own (state-space, "
                "convolution, linear or shared attention) and get no prefix; the others do.",
                stacklevel=4,
            )
        if layer.plain_attention:
            warnings.warn(
                f"{join_names(layer.plain_attention)} of {name} compute attention themselves and get no prefix. The "
                "others do.",
                stacklevel=4,
            )
        if layer.unreached:
            warnings.warn(
                f"A forward pass of {name} on dummy inputs did not reach {join_names(layer.unreached)}: no prefix "
                "there. If these modules are to have one, give inputs that reach them: "
                "`with prefix_adapter.example_inputs(**batch): get_peft_model(...)`.",
                stacklevel=4,
            )
