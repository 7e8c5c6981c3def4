"""Train a prefix for a causal language model on stories of one style, and compare the model with and without it.

    pip install "prefix-adapter[train]"
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --learning-rate 1e-2 --epochs 5

The 26 stories of data/stories/train.jsonl have one style: they begin under the blue hill and end with the moon. The
prefix learns this style; the model stays frozen. The script prints the perplexity of six other stories. It also lets
the model continue their first sentences (greedily), and prints in how many continuations the moon says good night, and
one continuation. The six stories also select the best step, so the figures are slightly in favour of the prefix.

--model is a name on the Hub or a folder; the model should know English stories. The other defaults are for
stories260K, a Llama of 260 thousand parameters trained on TinyStories. With it the script takes half a minute on one
CPU core (OMP_NUM_THREADS=1), and the perplexity fell from 13.2 to 3.3. That model does not know the end-of-sequence
token used here, so it does not stop after the moon. A larger model needs a lower rate and fewer epochs; those above
are a guess.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator

from prefix_adapter.training import Data, Recipe, answer_rows, load_trained, train
from prefix_adapter.training.data import load_rows
from prefix_adapter.training.evaluation import evaluate

STORIES = Path(__file__).parent / "data" / "stories"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a causal language model: a name on the Hub or a folder")
parser.add_argument("--output", default="runs/stories", help="folder for the adapter")
parser.add_argument("--epochs", type=float, default=40)
parser.add_argument("--learning-rate", type=float, default=5e-2)
args = parser.parse_args()

recipe = Recipe(
    task="causal-lm",
    model=args.model,
    output_dir=args.output,
    data=Data(train=STORIES / "train.jsonl", validation=STORIES / "validation.jsonl"),
    adapter={"num_virtual_tokens": 16},
    task_kwargs={"max_new_tokens": 80},
    max_length=256,
    batch_size=2,
    num_train_epochs=args.epochs,
    learning_rate=args.learning_rate,
)
train(recipe)

accelerator = Accelerator()
_, task, model = load_trained(args.output)
model.to(accelerator.device)
stories = load_rows(recipe.data, "validation")
prompts = {"prompt": [story.partition(". ")[0] + "." for story in stories["text"]]}


def measure():
    metrics, _ = evaluate(task, model, stories, recipe.eval_batch_size, accelerator)
    answers = answer_rows(task, model, prompts, recipe.eval_batch_size, accelerator.device)
    return metrics["perplexity"], [answer["prediction"] for answer in answers]


with model.disable_adapter():
    without = measure()
results = {"without the prefix": without, "with the prefix": measure()}
print(f"\n{'':20}{'perplexity':>12}{'good nights':>14}")
for title, (perplexity, texts) in results.items():
    moons = sum("And the moon said good night." in text for text in texts)
    print(f"{title:20}{perplexity:12.2f}{f'{moons} of {len(texts)}':>14}")
print(f"\n{prompts['prompt'][0]} ...")
for title, (_, texts) in results.items():
    print(f"    {title:20}... {texts[0]!r}")
