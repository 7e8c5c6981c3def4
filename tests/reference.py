"""References that have nothing of the package in them: P-Tuning v2 in plain tensor maths, and PEFT's prefix tuning.

P-Tuning v2 for BERT and RoBERTa is written from the papers. Everything there is a function of `weights`, a flat
dictionary, so that the reference has gradients of its own.
"""

import inspect
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

# peft 0.21 looks for an argument `past_key_values`, which is `cache` from transformers 5.24 on: with a task head
# PEFT's prefix tuning is an error there, and `generate` returns the base model's tokens.
PEFT_RUNS = "past_key_values" in inspect.signature(transformers.BertModel.forward).parameters
needs_peft_to_run = pytest.mark.skipif(
    not PEFT_RUNS,
    reason="PEFT's own prefix tuning does not generate with this transformers (an old name)",
)


def output_of_peft(model: Any, **inputs: Any) -> Any:
    """What a model with a PREFIX_TUNING adapter of PEFT's computes.

    Where PEFT cannot, the backbone is given PEFT's keys and values and a mask with as many columns, as PEFT does.
    """
    if PEFT_RUNS or model.active_peft_config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return model(**inputs)  # transformers still accepts the old name in a call of these
    base = model.get_base_model()

    def put_in(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompt, mask = model.get_prompt(len(inputs["input_ids"])), kwargs.get("attention_mask")
        if mask is not None and not base.config.is_encoder_decoder:
            seen = mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens)
            kwargs = {**kwargs, "attention_mask": torch.cat([seen, mask], dim=1)}
        return args, {**kwargs, "cache": prompt}

    handle = base.base_model.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        return base(**inputs)
    finally:
        handle.remove()


Weights = dict[str, Tensor]


def weights_of(peft_model: torch.nn.Module) -> Weights:
    """Copies of a PEFT model's weights by their names in the backbone; what is trained is a leaf with a gradient."""
    weights = {}
    for name, parameter in peft_model.named_parameters():
        if "original_module" not in name:
            short = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            weights[short] = parameter.detach().clone()
            weights[short].requires_grad_("prefix_tuning_v2" in name or "modules_to_save" in name)
    return weights


def prefix(weights: Weights) -> Tensor:
    """The prefix `[n, layers * 2 * hidden]`: the table, or Embedding - Linear - Tanh - Linear of it."""
    name = "prefix_tuning_v2.prefix_tuning_v2_{}.default"
    table = weights[f"{name.format('embedding')}.weight"]
    if f"{name.format('output')}.weight" not in weights:
        return table
    return _linear(weights, name.format("output"), torch.tanh(_linear(weights, name.format("hidden"), table)))


def encoder(
    kind: str, config, weights: Weights, ids: Tensor, mask: Tensor, table: Tensor | None, shift: int
) -> tuple[Tensor, Tensor]:
    """Last hidden states `[batch, tokens, hidden]` and classification logits; without a prefix if `table` is None."""
    x = hidden_states(kind, config, weights, ids, mask, table, shift)
    first = x[:, 0]
    if kind == "roberta":
        logits = _linear(weights, "classifier.out_proj", torch.tanh(_linear(weights, "classifier.dense", first)))
    else:
        logits = _linear(weights, "classifier", torch.tanh(_linear(weights, "bert.pooler.dense", first)))
    return x, logits


def hidden_states(
    kind: str, config, weights: Weights, ids: Tensor, mask: Tensor, table: Tensor | None, shift: int = 0
) -> Tensor:
    """Last hidden states `[batch, tokens, hidden]`; without a prefix if `table` is None."""
    batch, tokens = ids.shape
    if kind == "roberta":
        # fairseq's positions: they start at padding_idx + 1 and count what is no padding.
        real = (ids != config.pad_token_id).long()
        positions = config.pad_token_id + (real.cumsum(1) + shift) * real
    else:
        positions = torch.arange(tokens).expand(batch, tokens) + shift
    x = weights[f"{kind}.embeddings.word_embeddings.weight"][ids]
    x = x + weights[f"{kind}.embeddings.position_embeddings.weight"][positions]
    x = x + weights[f"{kind}.embeddings.token_type_embeddings.weight"][0]
    x = _norm(weights, f"{kind}.embeddings.LayerNorm", x, config.layer_norm_eps)

    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        at = f"{kind}.encoder.layer.{layer}"
        query, key, value = (_linear(weights, f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        visible = mask.bool()
        if table is not None:
            own = table[:, layer * 2 * config.hidden_size : (layer + 1) * 2 * config.hidden_size]
            prefix_key, prefix_value = own.chunk(2, dim=1)
            key = torch.cat([prefix_key.expand(batch, -1, -1), key], dim=1)
            value = torch.cat([prefix_value.expand(batch, -1, -1), value], dim=1)
            visible = torch.cat([torch.ones(batch, len(table), dtype=torch.bool), visible], dim=1)
        context = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
            scores = scores.masked_fill(~visible[:, None, :], -math.inf)
            context.append(scores.softmax(dim=-1) @ value[..., part])
        attended = _linear(weights, f"{at}.attention.output.dense", torch.cat(context, dim=-1))
        x = _norm(weights, f"{at}.attention.output.LayerNorm", attended + x, config.layer_norm_eps)
        inner = _gelu(_linear(weights, f"{at}.intermediate.dense", x))
        x = _linear(weights, f"{at}.output.dense", inner) + x
        x = _norm(weights, f"{at}.output.LayerNorm", x, config.layer_norm_eps)
    return x


def deberta_v2(config, weights: Weights, ids: Tensor, mask: Tensor, table: Tensor | None, shift: int) -> Tensor:
    """Last hidden states `[batch, tokens, hidden]` of DeBERTa-v2, by the formulas of its paper (section 3).

    P-tuning-v2 puts the prefix in front of keys and values. It has no share in the terms of relative positions.
    """
    batch, tokens = ids.shape
    x = weights["deberta.embeddings.word_embeddings.weight"][ids]
    if config.position_biased_input:
        x = x + weights["deberta.embeddings.position_embeddings.weight"][torch.arange(tokens) + shift]
    embedded = x = _norm(weights, "deberta.embeddings.LayerNorm", x, config.layer_norm_eps)

    middle, furthest = config.position_buckets // 2, config.max_relative_positions - 1
    bucket = {0: 0}
    for far in range(1, tokens):
        log = math.log(far / middle) / math.log(furthest / middle) if far > middle else 0
        bucket[far] = far if far <= middle else math.ceil(log * (middle - 1)) + middle
        bucket[-far] = -bucket[far]
    span = config.position_buckets
    rows = torch.tensor([[bucket[i - j] + span for j in range(tokens)] for i in range(tokens)]).clamp(0, 2 * span - 1)
    relative = weights["deberta.encoder.rel_embeddings.weight"]
    if config.norm_rel_ebd == "layer_norm":
        relative = _norm(weights, "deberta.encoder.LayerNorm", relative, config.layer_norm_eps)

    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        at = f"deberta.encoder.layer.{layer}"
        query, key, value = (
            _linear(weights, f"{at}.attention.self.{name}_proj", x) for name in ("query", "key", "value")
        )
        shared = "" if config.share_att_key else "pos_"
        far_query, far_key = (
            _linear(weights, f"{at}.attention.self.{shared}{name}_proj", relative) for name in ("query", "key")
        )
        context = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            content = query[..., part] @ key[..., part].transpose(1, 2)
            content_to_position = torch.einsum("bid,ijd->bij", query[..., part], far_key[rows][..., part])
            position_to_content = torch.einsum("bjd,ijd->bij", key[..., part], far_query[rows][..., part])
            scores = content + content_to_position + position_to_content
            scores = scores.masked_fill(mask[:, None, :] == 0, -math.inf)
            values = value[..., part]
            if table is not None:
                own = table[:, layer * 2 * config.hidden_size : (layer + 1) * 2 * config.hidden_size]
                prefix_key, prefix_value = (states[:, part].expand(batch, -1, -1) for states in own.chunk(2, dim=1))
                scores = torch.cat([query[..., part] @ prefix_key.transpose(1, 2), scores], dim=2)
                values = torch.cat([prefix_value, values], dim=1)
            context.append((scores / math.sqrt(3 * size)).softmax(dim=-1) @ values)
        attended = _linear(weights, f"{at}.attention.output.dense", torch.cat(context, dim=-1))
        x = _norm(weights, f"{at}.attention.output.LayerNorm", attended + x, config.layer_norm_eps)
        inner = _gelu(_linear(weights, f"{at}.intermediate.dense", x))
        x = _linear(weights, f"{at}.output.dense", inner) + x
        x = _norm(weights, f"{at}.output.LayerNorm", x, config.layer_norm_eps)
        if layer == 0 and config.conv_kernel_size:
            filters, bias = (weights[f"deberta.encoder.conv.conv.{part}"] for part in ("weight", "bias"))
            near = torch.conv1d(embedded.transpose(1, 2), filters, bias, padding="same").transpose(1, 2)
            x = _norm(weights, "deberta.encoder.conv.LayerNorm", x + torch.tanh(near), config.layer_norm_eps)
    return x


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
