"""Train a frozen encoder to tag named entities, and tag a sentence with the saved adapter.

    pip install "prefix-adapter[train]"
    python examples/ner.py --train train.jsonl --validation dev.jsonl --model bert-base-cased

A row is `{"tokens": ["Ravi", "flew", "to", "Lima"], "tags": ["B-person", "O", "O", "B-location"]}`. Whole
entities are scored (precision, recall and F1 of seqeval). Sentences longer than the model's input are read in windows.
The same from the command line:

    prefix-adapter train --config token-classification --model bert-base-cased --data.train train.jsonl \\
        --data.validation dev.jsonl --output_dir runs/ner
    prefix-adapter predict runs/ner sentences.jsonl tagged.jsonl

ModernBERT, DeBERTa-v3 and DistilBERT have no cache for a prefix. With --entry-point attention (in a recipe, or as an
option of the command, `adapter.entry_point`) it enters through their attention function:

    python examples/ner.py --train train.jsonl --model answerdotai/ModernBERT-base --entry-point attention
"""

import argparse
import json

import torch

from prefix_adapter.training import Data, Recipe, answer_rows, load_trained, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", required=True, help="training rows")
parser.add_argument("--validation", help="rows for selecting the best step (default: a tenth of the training rows)")
parser.add_argument("--test", help="rows for the final evaluation")
parser.add_argument("--model", default="bert-base-cased", help="the base model")
parser.add_argument("--entry-point", default="cache", choices=["cache", "attention"], help="where the prefix enters")
parser.add_argument("--output", default="runs/ner", help="folder for the adapter")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--max-rows", type=int, help="use only this many rows of each file, for a quick try")
args = parser.parse_args()

recipe = Recipe(
    task="token-classification",
    model=args.model,
    output_dir=args.output,
    data=Data(
        train=args.train,
        validation=args.validation,
        test=args.test,
        max_train_rows=args.max_rows,
        max_validation_rows=args.max_rows,
        max_test_rows=args.max_rows,
    ),
    adapter={"num_virtual_tokens": 20, "entry_point": args.entry_point},
    num_train_epochs=args.epochs,
    batch_size=16,
    group_by_length=True,
)
results = train(recipe)
print(json.dumps({split: results[split] for split in ("validation", "test") if split in results}, indent=2))

_, task, model = load_trained(args.output)
tokens = ["Ravi", "flew", "from", "Lima", "to", "the", "Nile", "with", "Acme", "Airways"]
(answer,) = answer_rows(task, model, {"tokens": [tokens]}, batch_size=1, device=torch.device("cpu"))
print(" ".join(f"{token}/{tag}" for token, tag in zip(tokens, answer["prediction"], strict=True)))
