"""Train one prefix on two tasks together, then continue with one of the tasks alone.

    pip install "prefix-adapter[train]"
    python examples/multitask.py --ner ner.jsonl --pos pos.jsonl --model bert-base-cased

The tasks are named entities and parts of speech; rows of both are `{"tokens": ["Ravi", "flew"], "tags": [...]}`. Each
step trains one of the tasks, drawn in proportion to its number of rows. The result in runs/shared is an adapter for
each task, ner and pos, with the same prefix and separate heads. Then the named entities continue in runs/ner. The same
from the command line:

    prefix-adapter train-together --config shared.yaml
    prefix-adapter train --config token-classification --model bert-base-cased --data.train ner.jsonl \\
        --output_dir runs/ner --init_from runs/shared/ner --adapter.num_virtual_tokens 20

shared.yaml has the shared keys at the top level, and the keys of each task under `tasks`, as in the script below.
"""

import argparse

from prefix_adapter.training import Data, JointRecipe, Recipe, train, train_together

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ner", required=True, help="rows with named entities")
parser.add_argument("--ner-validation", help="rows for selecting the best step (default: a tenth of --ner)")
parser.add_argument("--pos", required=True, help="rows with parts of speech")
parser.add_argument("--pos-validation", help="like --ner-validation")
parser.add_argument("--model", default="bert-base-cased", help="the base model")
parser.add_argument("--output", default="runs", help="folder for the runs")
parser.add_argument("--epochs", type=float, default=5, help="epochs of the joint and of the single training")
parser.add_argument("--max-rows", type=int, help="use only this many rows of each file, for a quick try")
args = parser.parse_args()

few = {"max_train_rows": args.max_rows, "max_validation_rows": args.max_rows}
ner = {"train": args.ner, "validation": args.ner_validation, **few}
pos = {"train": args.pos, "validation": args.pos_validation, **few}
settings = {
    "model": args.model,
    "adapter": {"num_virtual_tokens": 20},
    "num_train_epochs": args.epochs,
    "batch_size": 16,
    "group_by_length": True,
}
shared = JointRecipe.from_dict(
    {
        **settings,
        "output_dir": f"{args.output}/shared",
        "tasks": {
            "ner": {"task": "token-classification", "data": ner},
            "pos": {"task": "token-classification", "data": pos},
        },
    }
)
together = train_together(shared)["tasks"]
alone = train(
    Recipe(
        **settings,
        task="token-classification",
        data=Data(**ner),
        init_from=f"{args.output}/shared/ner",
        output_dir=f"{args.output}/ner",
    )
)
print(f"pos, together: {together['pos']['validation']['accuracy']:.3f} accuracy")
print(f"ner, together: {together['ner']['validation']['f1']:.3f} F1")
print(f"ner, then alone: {alone['validation']['f1']:.3f} F1")
