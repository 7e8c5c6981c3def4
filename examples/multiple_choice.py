"""Train a pretrained encoder to choose between alternatives, as in COPA.

    pip install "prefix-adapter[train]"
    python examples/multiple_choice.py --train train.jsonl --validation val.jsonl --output runs/copa

The files have one row per line (.jsonl, or .jsonl.gz), with any number of columns `choice1`, `choice2`, ...:

    {"premise": "The man turned on the faucet.", "choice1": "The toilet filled.", "choice2": "Water flowed.",
     "question": "effect", "label": 1}

`label` is the index of the right choice, counted from 0. For each choice the encoder reads the premise, the question
and the choice, and the head computes a score. For endings in one column, as in HellaSwag, use `columns={"text": "ctx",
"choices": "endings"}` below. The adapter is saved in `--output`, with its card, curve, metrics and recipe.

COPA needs knowledge of the world, which a frozen encoder cannot learn: small encoders stay near chance.
"""

import argparse

from prefix_adapter.training import Data, Recipe, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="training rows")
    parser.add_argument("--validation", required=True, help="rows for selecting the best checkpoint")
    parser.add_argument("--model", default="FacebookAI/roberta-large", help="a name on the Hub, or a folder")
    parser.add_argument("--output", default="runs/multiple-choice", help="a new folder")
    parser.add_argument("--max-rows", type=int, help="use only this many training and validation rows")
    parser.add_argument("--epochs", type=float, default=10)
    args = parser.parse_args()

    recipe = Recipe(
        task="multiple-choice",
        model=args.model,
        output_dir=args.output,
        data=Data(
            train=args.train,
            validation=args.validation,
            columns={"text": "premise"},
            max_train_rows=args.max_rows,
            max_validation_rows=args.max_rows,
        ),
        adapter={"num_virtual_tokens": 16},
        batch_size=16,
        num_train_epochs=args.epochs,
    )
    results = train(recipe)
    print(f"accuracy {results['validation']['accuracy']:.4f}; the adapter is in {recipe.output_dir}.")


if __name__ == "__main__":
    main()
