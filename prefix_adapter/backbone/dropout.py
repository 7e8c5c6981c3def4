"""The dropout of a frozen backbone, which only adds noise to the training of a prefix."""

from __future__ import annotations

from torch import nn


def turn_off_dropout(model: nn.Module) -> None:
    """Set the probabilities of dropout and LayerDrop in a backbone to 0; its task head keeps its own.

    A frozen backbone does not learn, so dropout does not protect it from overfitting. Its noise slows the training of
    a prefix down (docs/learning.md). Models in eval mode have no dropout, but `Trainer` puts the whole model into
    training mode for each step.

    Args:
        model: A transformers model, before an adapter is added.

    Raises:
        ValueError: If the model has an adapter already, whose own dropout would be set to 0 too.

    Example:
        ```python
        base = AutoModelForSequenceClassification.from_pretrained("bert-base-cased")
        turn_off_dropout(base)
        model = get_peft_model(base, PrefixTuningV2Config(task_type="SEQ_CLS"))
        ```
    """
    if getattr(model, "peft_config", None):
        raise ValueError("`turn_off_dropout` is for a base model without adapters: call it before `get_peft_model`.")
    backbone: nn.Module = getattr(model, "base_model", model)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # Modules that call `torch.nn.functional.dropout` keep the probability in an attribute.
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
