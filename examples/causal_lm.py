"""Teach a causal language model a way of telling stories, and compare it with and without the prefix.

    pip install "prefix-adapter[train]"
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --learning-rate 1e-2 --epochs 5

The 26 stories of data/stories/train.jsonl are all told alike: they begin under the blue hill and end with the moon. The
prefix learns that; the model stays as it is. Printed are the perplexity on six stories that training has not seen, in how
many of them the moon says good night when the model goes on greedily after their first sentence, and one of those
continuations. The perplexity also chooses the checkpoint, so it is a little too good; see `data.test` for better practice.

--model is a name on the Hub or a folder; it should know English stories. The other defaults are for stories260K, a Llama
of 260 thousand parameters trained on TinyStories, which needs about 15 seconds of one CPU core. With it the perplexity
fell from 13.2 to 3.4. It was never taught its end-of-sequence token, and babbles on after the moon; so only the first 60
tokens are shown. A larger model needs a lower rate and fewer epochs, for which the command above is a guess.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from prefix_adapter import PeftModel
from prefix_adapter.training import Data, Recipe, train
from prefix_adapter.training.data import load_rows
from prefix_adapter.training.evaluation import answer_rows, evaluate
from prefix_adapter.training.model import load_base, load_tokenizer
from prefix_adapter.training.tasks import TASK_CLASSES

STORIES = Path(__file__).parent / "data" / "stories"
MOON = "And the moon said good night."


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a causal language model: a name on the Hub or a folder")
    parser.add_argument("--output", type=Path, default=Path("runs/stories"), help="folder for the adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --output")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=5e-2)
    args = parser.parse_args()
    recipe = Recipe(
        task="causal-lm",
        model=args.model,
        output_dir=args.output,
        data=Data(train=STORIES / "train.jsonl", validation=STORIES / "validation.jsonl"),
        adapter={"num_virtual_tokens": 16},
        task_kwargs={"max_new_tokens": 60},
        max_length=256,
        batch_size=2,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
    )
    accelerator = Accelerator()
    task = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
    stories = load_rows(recipe.data, "validation")
    prompts = {"prompt": [story.partition(". ")[0] + "." for story in stories["text"]]}
    base = load_base(recipe, task).to(accelerator.device).eval()
    before, _ = evaluate(task, base, stories, recipe.eval_batch_size, accelerator)
    without = answer_rows(task, base, prompts, recipe.eval_batch_size, accelerator.device)

    results = train(recipe, overwrite=args.overwrite)

    model = PeftModel.from_pretrained(base, args.output).eval()
    behind = answer_rows(task, model, prompts, recipe.eval_batch_size, accelerator.device)
    print(f"\n{'':16}{'perplexity':>12}{'the moon says good night':>28}")
    for title, perplexity, answers in (
        ("without prefix", before["perplexity"], without),
        ("with prefix", results["validation"]["perplexity"], behind),
    ):
        moons = sum(MOON in answer["prediction"] for answer in answers)
        print(f"{title:16}{perplexity:12.2f}{f'{moons} of {len(answers)} times':>28}")
    print(f"\n{prompts['prompt'][0]} ...")
    for title, answers in (("without prefix", without), ("with prefix", behind)):
        print(f"    {title:16}... {answers[0]['prediction']!r}")
    print(f"\nThe adapter and what goes with it are in {args.output}.")


if __name__ == "__main__":
    main()
