"""Tiny random models for tests: real architectures, no weights to download."""

from pathlib import Path

import torch
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.overrides import TorchFunctionMode

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>"]
VOCAB, LENGTH, LAYERS, HEADS, HIDDEN = 99, 64, 3, 4, 32

CONFIGS = {
    "bert": lambda: tr.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=LENGTH, initializer_range=0.2,
    ),
    "roberta": lambda: tr.RobertaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=LENGTH + 2, initializer_range=0.2,
    ),
    "distilbert": lambda: tr.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=LENGTH,
        initializer_range=0.2,
    ),
    "gpt2": lambda: tr.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "llama": lambda: tr.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=LENGTH, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "t5": lambda: tr.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, num_layers=LAYERS, num_heads=HEADS, d_kv=8, d_ff=48,
        decoder_start_token_id=0, initializer_factor=5.0,
    ),
    "bart": lambda: tr.BartConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=LENGTH,
        init_std=0.2,
    ),
}  # fmt: skip


def config(kind: str, **changes) -> tr.PreTrainedConfig:
    """A tiny configuration with `changes` made to it."""
    result = CONFIGS[kind]()
    result.num_labels = 3
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def model(kind: str, auto_class: str = "AutoModel", seed: int = 0, attn: str | None = None, **changes):
    """A tiny random model in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    kwargs = {} if attn is None else {"attn_implementation": attn}
    return getattr(tr, auto_class).from_config(config(kind, **changes), **kwargs).eval()


def save(folder: Path, kind: str, words: list[str], auto_class: str = "AutoModel", **changes) -> str:
    """Save a tiny random model of `CONFIGS` without dropout, with a tokenizer of words between spaces."""
    vocabulary = {word: i for i, word in enumerate(_SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    if kind in ("bert", "roberta"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        if kind == "roberta":  # positions start after the padding token's id
            changes = {"pad_token_id": 0, **changes}
    elif kind in ("t5", "bart"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 5)]
        )
        changes = {"eos_token_id": 5, "pad_token_id": 0, "decoder_start_token_id": 0, **changes}
    else:
        changes = {"eos_token_id": 5, "pad_token_id": 0, **changes}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    no_dropout = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "t5": {"dropout_rate": 0.0},
        "bart": {"dropout": 0.0},
        "llama": {},
    }
    model(kind, auto_class, **{**no_dropout[kind], **changes}).save_pretrained(folder)
    return str(folder)


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids `[batch, length]` without special tokens."""
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(module, std: float = 0.5, seed: int = 2) -> None:
    """Draw all trainable parameters anew, so that a prefix has an effect that cannot be overlooked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class OtherDevice(TorchFunctionMode):
    """Stand-in for `torch.set_default_device("cuda")`, which a generator of the CPU does not fit."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        filled = args and isinstance(args[0], torch.Tensor)
        if kwargs.get("generator") is not None and kwargs.get("device") is None and not filled:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return function(*args, **kwargs)
