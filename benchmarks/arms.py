"""The methods that performance.py compares: each a model, its trained parameters the only ones with a gradient.

`floor` is the least that any prefix method must do: bare leaf tensors of keys and values in front of attention, no
encoder, no hook. `reference` is P-Tuning v2 as the paper describes it (Liu et al. 2022, sections 3.2 and 3.3): the
prompt's embedding and its MLP are computed for every row of the batch and handed to the backbone as `past_key_values`.
Dropout on the prefix is off in all of them. `third` is ours in the last third of the layers, `frozen` the backbone by
itself with gradients that go through it to its embeddings.
"""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, LlamaConfig
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForSequenceClassification as SequenceClassification
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefix_adapter import PrefixTuningV2Config

ARMS = ("full", "lora", "peft", "reference", "ours", "third", "floor")


def minilm() -> BertConfig:
    """The configuration of all-MiniLM-L6-v2."""
    return BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )


def multilingual() -> BertConfig:
    """The configuration of bert-base-multilingual-cased."""
    return BertConfig(vocab_size=119547)


def llama() -> LlamaConfig:
    """A decoder of 88 million parameters with grouped-query attention."""
    return LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )


CONFIGS = {"minilm": minilm, "multilingual": multilingual, "llama": llama}


def base_model(config, implementation="sdpa", seed=0):
    """A random backbone with its head, the same for the same seed."""
    torch.manual_seed(seed)
    decoder = isinstance(config, LlamaConfig)
    auto_class = CausalLM if decoder else SequenceClassification
    config = copy.deepcopy(config)
    if not decoder:
        config.num_labels = 3
    return auto_class.from_config(config, attn_implementation=implementation)


def head_of(model):
    """The parameters of the task head, which every arm of an encoder trains."""
    return [p for name, p in model.named_parameters() if name.startswith("classifier.")]


def build(arm, config, n=20, width=None, dropout=0.0):
    """The model of an arm: `n` virtual tokens, an MLP of `width` or a table."""
    task = "CAUSAL_LM" if isinstance(config, LlamaConfig) else "SEQ_CLS"
    if arm == "full":
        return base_model(config)
    if arm == "frozen":
        model = base_model(config).requires_grad_(False)
        for parameter in head_of(model):
            parameter.requires_grad_(True)
        model.enable_input_require_grads()
        return model
    if arm == "floor":
        return floor(config, n)
    if arm == "reference":
        return Reference(config, n, width)
    if arm == "lora":
        targets = ["q_proj", "v_proj"] if task == "CAUSAL_LM" else ["query", "value"]
        return get_peft_model(base_model(config), LoraConfig(task_type=task, r=8, target_modules=targets))
    if arm == "peft":
        settings = {"prefix_projection": width is not None, "encoder_hidden_size": width}
        return get_peft_model(base_model(config), PrefixTuningConfig(task_type=task, num_virtual_tokens=n, **settings))
    layers = config.num_hidden_layers
    return get_peft_model(
        base_model(config),
        PrefixTuningV2Config(
            task_type=task,
            num_virtual_tokens=n,
            prefix_projection=width is not None,
            encoder_hidden_size=width,
            prefix_dropout=dropout,
            layers_to_transform=list(range(layers - layers // 3, layers)) if arm == "third" else None,
        ),
    )


def floor(config, n):
    """A frozen backbone whose attention reads leaf tensors `[1, heads, n, size]`."""
    AttentionInterface.register("floor", _attend)
    AttentionMaskInterface.register("floor", AttentionMaskInterface()["sdpa"])
    model = base_model(config, "floor").requires_grad_(False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    for module in model.modules():
        if any(hasattr(module, name) for name in ("q_proj", "query")):
            for name in ("prefix_keys", "prefix_values"):
                module.register_parameter(name, nn.Parameter(0.02 * torch.randn(1, heads, n, size)))
    for parameter in head_of(model):
        parameter.requires_grad_(True)
    return model


def _attend(module, query, key, value, attention_mask, **kwargs):
    batch, _, tokens, _ = query.shape
    n = module.prefix_keys.shape[2]
    key = torch.cat([module.prefix_keys.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([module.prefix_values.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    if attention_mask is not None:
        seen = 0.0 if attention_mask.is_floating_point() else True
        attention_mask = F.pad(attention_mask, (n, 0), value=seen)
    elif module.is_causal and tokens > 1:
        attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=key.device).tril(n)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class Reference(nn.Module):
    """P-Tuning v2 for a BERT, with the prefix computed row by row."""

    def __init__(self, config, n, width):
        super().__init__()
        self.model = base_model(config).requires_grad_(False)
        for parameter in head_of(self.model):
            parameter.requires_grad_(True)
        self.config, self.n = config, n
        columns = 2 * config.num_hidden_layers * config.hidden_size
        self.embedding = nn.Embedding(n, config.hidden_size if width else columns)
        layers = [nn.Linear(config.hidden_size, width), nn.Tanh(), nn.Linear(width, columns)] if width else []
        self.mlp = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        """The model's loss and logits."""
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
