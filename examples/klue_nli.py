"""Run the KLUE-NLI experiment of kobongsoo/BERT: Korean natural language inference, with the recipes of the package.

    pip install "prefix-adapter[train]"
    python examples/klue_nli.py                             # 20 tokens, an MLP of width 512; published: 0.692
    python examples/klue_nli.py --recipe klue-nli-full      # full fine-tuning; published: 0.743
    python examples/klue_nli.py --recipe klue-nli-prefix-20 --learning-rate 1e-2

The published table (docs/recipes.md) reports an accuracy of 0.531 for a table of 20 tokens at the rate of 3e-5, which
all of its rows use. A table needs a far higher rate: the published P-Tuning v2 settings use 5e-3 to 6e-2. The last
command repeats that row with such a rate. The data come from the Hub (`klue/klue`), or from a folder with
train.jsonl.gz and dev.jsonl.gz, whose columns are premise, hypothesis and label.
"""

import argparse
import json

from prefix_adapter.training import load_recipe, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--recipe", default="klue-nli-prefix-20-mlp", help="one of the recipes klue-nli-*")
parser.add_argument("--model", help="base model, instead of bert-base-multilingual-cased")
parser.add_argument("--data", help="folder with train.jsonl.gz and dev.jsonl.gz, instead of the data set on the Hub")
parser.add_argument("--output", default="runs/klue-nli", help="folder for the adapter")
parser.add_argument("--learning-rate", type=float, help="learning rate of adapter and head, instead of 3e-5")
parser.add_argument("--max-rows", type=int, help="use only this many training and validation rows, for a quick try")
parser.add_argument("--max-steps", type=int, help="stop after this many steps")
args = parser.parse_args()

changes = {
    "model": args.model,
    "learning_rate": args.learning_rate,
    "head_learning_rate": args.learning_rate,
    "data.max_train_rows": args.max_rows,
    "data.max_validation_rows": args.max_rows,
    "max_steps": args.max_steps,
}
given = {key: value for key, value in changes.items() if value is not None}
if args.data:
    files = {"data.train": f"{args.data}/train.jsonl.gz", "data.validation": f"{args.data}/dev.jsonl.gz"}
    given |= {**files, "data.path": None, "data.name": None}
results = train(load_recipe(args.recipe, output_dir=args.output, **given))
print(json.dumps(results["validation"], indent=2))
