"""Train a prefix for an encoder-decoder that reverses its output: "three one four" becomes "4 1 3".

    pip install "prefix-adapter[train]"
    OMP_NUM_THREADS=1 python examples/seq2seq.py

The script needs no pretrained T5. Without --model it creates a tiny one with random weights, and first trains the
whole model to write digits in the order of the input ("3 1 4"). This only shows the mechanics, offline and in about a
minute on one CPU core. Then the model is frozen, and a prefix for its encoder, decoder and cross-attention is trained
to write the digits backwards. With the adapter the model writes backwards, without it still forwards.

--model is a T5 or another encoder-decoder, by its name on the Hub or its folder. The script then trains only the
prefix.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from prefix_adapter.training import Data, Recipe, answer_rows, load_trained, train

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a pretrained encoder-decoder (default: a tiny one is created)")
parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder for all results")
parser.add_argument("--learning-rate", type=float, default=0.05, help="learning rate of the prefix")
parser.add_argument("--max-steps", type=int, default=1000, help="optimizer steps of each training")
args = parser.parse_args()


def write_rows(path, count, seed, backwards):
    """Write rows of one to four digits, in words and in figures. The two files share most of the short rows."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            digits = [draw.randrange(10) for _ in range(draw.randint(1, 4))]
            figures = map(str, reversed(digits) if backwards else digits)
            row = {"text": " ".join(WORDS[i] for i in digits), "target": " ".join(figures)}
            file.write(json.dumps(row) + "\n")
    return path


def teach(model, name, backwards, **settings):
    """Train on generated rows; return the metrics on other rows."""
    data = Data(
        train=write_rows(args.output / f"{name}-train.jsonl", 2000, 1, backwards),
        validation=write_rows(args.output / f"{name}-validation.jsonl", 100, 2, backwards),
    )
    task = {"task": "seq2seq-lm", "max_length": 32, "task_kwargs": {"max_target_length": 16}}
    steps = {"num_train_epochs": 100, "max_steps": args.max_steps, "eval_steps": 250}
    return train(Recipe(model=model, output_dir=args.output / name, data=data, **task, **steps, **settings))


def make_model(folder):
    """Create and train a tiny T5 that writes digits in the order of the input."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    size = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "dropout_rate": 0.0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(vocabulary), decoder_start_token_id=0, **size))
    model.save_pretrained(folder)
    teach(folder, "forwards", backwards=False, adapter={"peft_type": "FULL"}, learning_rate=2e-3)
    model.load_state_dict(load_file(args.output / "forwards" / "trained.safetensors"), strict=False)
    model.save_pretrained(folder)
    return folder


args.output.mkdir(parents=True, exist_ok=True)
base = args.model or make_model(args.output / "base")
adapter = {"num_virtual_tokens": 8}
results = teach(base, "backwards", backwards=True, adapter=adapter, learning_rate=args.learning_rate)
print("\nBackwards:", ", ".join(f"{name} {value:.3f}" for name, value in results["validation"].items()))

_, task, model = load_trained(args.output / "backwards")
rows = {"text": ["three one four", "nine", "two seven"]}
answers = answer_rows(task, model, rows, batch_size=3, device=torch.device("cpu"))
with model.disable_adapter():
    before = answer_rows(task, model, rows, batch_size=3, device=torch.device("cpu"))
for text, answer, other in zip(rows["text"], answers, before, strict=True):
    print(f"    {text:20}with the prefix {answer['prediction']:10}without it {other['prediction']}")
