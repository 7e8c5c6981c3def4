"""Two tasks learn one prefix together, and one of them goes on alone from it.

    pip install "prefix-adapter[train]"
    python examples/multitask.py --ner ner.jsonl --pos pos.jsonl --model bert-base-cased

Named entities and parts of speech: rows of both are `{"tokens": ["Ravi", "flew"], "tags": [...]}`. Every step is one
of either task, drawn by the number of their rows. In runs/shared there is then an adapter for each task, ner and pos,
with the same prefix and a head of its own. The entities go on from there in runs/ner. The same from the command line:

    prefix-adapter train-together --config shared.yaml
    prefix-adapter train --config token-classification --model bert-base-cased --data.train ner.jsonl \\
        --output_dir runs/ner --init_from runs/shared/ner --adapter.num_virtual_tokens 20

where shared.yaml has the keys that the tasks share, and under `tasks` those that each has for itself, as below.
"""

import argparse

from prefix_adapter.training import Data, JointRecipe, Recipe, train, train_together

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ner", required=True, help="rows with named entities")
parser.add_argument("--ner-validation", help="rows to choose the best step by; a tenth of the others if not given")
parser.add_argument("--pos", required=True, help="rows with parts of speech")
parser.add_argument("--pos-validation", help="as --ner-validation")
parser.add_argument("--model", default="bert-base-cased", help="the base model")
parser.add_argument("--output", default="runs", help="folder for the runs")
parser.add_argument("--epochs", type=float, default=5, help="passes over all rows together, and then over one task's")
parser.add_argument("--max-rows", type=int, help="use so many rows of each file, for a quick try")
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
