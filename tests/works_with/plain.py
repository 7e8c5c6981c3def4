"""The plain backbone with a prefix in its own cache: what a library must compute, with no code of the package."""

import inspect
from collections.abc import Callable

import tiny
import torch
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

N = 3
CACHE = "cache" if "cache" in inspect.signature(tr.LlamaForCausalLM.forward).parameters else "past_key_values"


def decoder(seed: int = 0) -> tr.PreTrainedModel:
    """A tiny Llama: grouped heads, no dropout."""
    return tiny.model("llama", "AutoModelForCausalLM", seed=seed)


def table_of(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    """The table `[n, layers * 2 * heads * size]` of an adapter in a wrapped model."""
    return next(p for name, p in model.named_parameters() if name.endswith(f"_embedding.{adapter}.weight"))


def logits(base: nn.Module, row: Tensor, table: Tensor | None) -> Tensor:
    """Logits of one row without padding. The table's keys and values stand in the cache before its first token."""
    config = base.config
    cache = tr.DynamicCache(config=config)
    length = 0 if table is None else len(table)
    if table is not None:
        size = config.hidden_size // config.num_attention_heads
        for layer, pair in enumerate(table.chunk(config.num_hidden_layers, dim=1)):
            key, value = (side.unflatten(1, (-1, size)).transpose(0, 1)[None] for side in pair.chunk(2, dim=1))
            cache.update(key, value, layer)
    mask = torch.ones(1, length + len(row), dtype=torch.long)
    positions = torch.arange(len(row))[None]
    return base(row[None], attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[0]


def log_probs(base: nn.Module, row: Tensor, table: Tensor | None) -> Tensor:
    """Log-probability of each token of a row but its first."""
    found = logits(base, row, table)[:-1].log_softmax(dim=-1)
    return found.gather(1, row[1:, None])[:, 0]


def step(table: Tensor, loss_of: Callable[[Tensor], Tensor], rate: float) -> tuple[float, Tensor]:
    """The loss, and the table after one step of gradient descent. `loss_of` gets a table."""
    leaf = table.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), leaf.detach() - rate * gradient


def tokenizer(chat_template: str | None = None) -> tr.PreTrainedTokenizerFast:
    """A tokenizer of the words w7, w8, ... between spaces, with `tiny.VOCAB` tokens."""
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "[USER]": 4, "[ASSISTANT]": 5, "[END]": 6}
    words |= {f"w{i}": i for i in range(len(words), tiny.VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "attention_mask"]
    found = tr.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)
    found.chat_template = chat_template
    return found


def text(length: int, seed: int) -> str:
    """A text of `length` words."""
    drawn = torch.randint(7, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in drawn.tolist())
