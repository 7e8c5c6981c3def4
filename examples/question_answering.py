"""Train a pretrained encoder to answer questions with a span of a text.

    pip install "prefix-adapter[train]"
    python examples/question_answering.py --data squad.jsonl --output runs/qa

`--data` is a file in SQuAD's format, with one question per line (.jsonl, or .jsonl.gz):

    {"question": "How many?", "context": "There are 308.", "answers": {"text": ["308"], "answer_start": [10]}}

Empty lists of answers mean that the text has no answer. Many questions share a context, so the rows are split by
context: scores on a text from the training rows would be too high. The files in `--output`:

    train.jsonl, validation.jsonl    the training rows, and the rows for selecting the best checkpoint
    adapter/                         the adapter with its card, curve, metrics and recipe

`accelerate launch examples/question_answering.py ...` uses several GPUs.
"""

import argparse
import random
from pathlib import Path

from accelerate import PartialState

from prefix_adapter.training import Data, Recipe, train
from prefix_adapter.training.data import read_file


def split_by_context(path: str, files: dict[str, str]) -> None:
    """Write the questions of nine in ten contexts to `files["train"]`, the others to `files["validation"]`."""
    rows = read_file(path)
    contexts = sorted(set(rows["context"]))
    held_out = set(random.Random(0).sample(contexts, max(1, len(contexts) // 10)))
    for name, own in {"train": set(contexts) - held_out, "validation": held_out}.items():
        rows.filter(own.__contains__, input_columns="context").to_json(files[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="questions in SQuAD's format")
    parser.add_argument("--model", default="google-bert/bert-base-uncased", help="a name on the Hub, or a folder")
    parser.add_argument("--output", type=Path, default=Path("runs/question-answering"), help="a new folder")
    parser.add_argument("--max-rows", type=int, help="use only this many training and validation questions")
    parser.add_argument("--epochs", type=float, default=5)
    args = parser.parse_args()

    files = {name: str(args.output / f"{name}.jsonl") for name in ("train", "validation")}
    processes = PartialState()
    if processes.is_main_process:
        args.output.mkdir(parents=True)
        split_by_context(args.data, files)
    processes.wait_for_everyone()
    recipe = Recipe(
        task="question-answering",
        model=args.model,
        output_dir=args.output / "adapter",
        data=Data(**files, max_train_rows=args.max_rows, max_validation_rows=args.max_rows),
        adapter={"num_virtual_tokens": 20},
        batch_size=16,
        num_train_epochs=args.epochs,
    )
    results = train(recipe)
    for name, value in results["validation"].items():
        print(f"{name:20}{value:.4f}")
    print(f"The adapter is in {recipe.output_dir}.")


if __name__ == "__main__":
    main()
