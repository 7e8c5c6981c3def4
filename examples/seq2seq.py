"""Turn a translation around with a prefix: "three one four" becomes "4 1 3".

    pip install "prefix-adapter[train]"
    python examples/seq2seq.py

No pretrained T5 is needed: without --model the script makes a tiny one with random weights and first trains all of it to
write down numbers in the order in which they are read ("3 1 4"). This only shows the mechanics, offline and in about a
minute of one CPU core. Then that model is frozen, and a prefix for its encoder, its decoder and its cross-attention
learns to write them backwards. With the adapter the model does the one, without it still the other.

--model takes a T5 or another encoder-decoder, a name on the Hub or a folder, and gives it the prefix alone.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast, T5Config

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, Recipe, train

WORDS = "zero one two three four five six seven eight nine".split()


def write_rows(path, count, seed, backwards):
    """Numbers of one to four digits, in words and in figures."""
    draw = random.Random(seed)
    numbers = [[draw.randrange(10) for _ in range(draw.randint(1, 4))] for _ in range(count)]
    rows = [
        {"text": " ".join(WORDS[i] for i in own), "target": " ".join(map(str, own[::-1] if backwards else own))}
        for own in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(model, folder, backwards, **changes):
    """A recipe, and its rows in the folder above its output."""
    name = folder.name
    data = Data(
        train=write_rows(folder.parent / f"{name}-train.jsonl", 2000, 1, backwards),
        validation=write_rows(folder.parent / f"{name}-validation.jsonl", 100, 2, backwards),
    )
    settings = {"max_length": 32, "eval_steps": 200, "task_kwargs": {"max_target_length": 16}, **changes}
    return Recipe(task="seq2seq-lm", model=model, output_dir=folder, data=data, **settings)


def make_base(folder, max_steps):
    """A tiny T5 that writes down numbers in their order."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "dropout_rate": 0.0}
    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=23, decoder_start_token_id=0, **size))
    model.save_pretrained(folder)
    full = {"adapter": {"peft_type": "FULL"}, "learning_rate": 2e-3, "max_steps": max_steps}
    recipe = make_recipe(folder, folder.parent / "forwards", backwards=False, **full)
    train(recipe, overwrite=True)
    model.load_state_dict(load_file(Path(recipe.output_dir) / "trained.safetensors"), strict=False)
    model.save_pretrained(folder)
    return str(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a pretrained encoder-decoder; a tiny one is made if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder for all that is made")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--max-steps", type=int, default=600, help="optimizer steps of each training")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    base = args.model or make_base(args.output / "base", args.max_steps)
    prefix = {"adapter": {"num_virtual_tokens": 8}, "learning_rate": args.learning_rate, "max_steps": args.max_steps}
    recipe = make_recipe(base, args.output / "backwards", backwards=True, **prefix)
    results = train(recipe, overwrite=True)
    print("\nWith the prefix:", {name: round(value, 3) for name, value in results["validation"].items()})

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), recipe.output_dir).eval()
    for text in ("three one four", "nine", "two seven"):
        inputs = tokenizer(text, return_tensors="pt")
        behind = tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0], skip_special_tokens=True)
        with model.disable_adapter():
            without = tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0], skip_special_tokens=True)
        print(f"    {text:16} without the prefix {without!r:12} with it {behind!r}")


if __name__ == "__main__":
    main()
