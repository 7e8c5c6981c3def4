"""Compare the training command's default settings with the best of a search, for a prefix, LoRA and full fine-tuning.

    python benchmarks/defaults.py --data FOLDER --models FOLDER
    python benchmarks/defaults.py --report

Pairs of models and data sets, rows and steps are those of learning.py. A search of a method has 12 points, the same
for all pairs, drawn from the space of `prefix-adapter search` for a prefix and from a space of the same kind for the
others. The best point is chosen on validation rows with a seed of its own. Then it and the defaults are trained with
each seed and evaluated once on the test rows. Finished runs are in `--results` and are not repeated.
"""

import math
import os
import random
import statistics
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import learning
import runs

POINTS = 12
DEFAULT = "default"
METHODS = {
    "prefix": ("P-Tuning v2", {"peft_type": "PREFIX_TUNING_V2"}),
    "lora": ("LoRA", {"peft_type": "LORA"}),
    "full": ("full fine-tuning", {"peft_type": "FULL"}),
}
PAIRS = ["minilm-pos", "minilm-banking77", "minilm-wnut17", "e5-pos", "e5-klue-nli", "smollm2-intents"]


def log_uniform(chance, low, high):
    """Draw a number from a range, uniformly in its logarithm, with two digits."""
    return float(f"{math.exp(chance.uniform(math.log(low), math.log(high))):.1e}")


def points_of(method):
    """Return the points of a method's search: settings of its adapter, and the learning rate."""
    chance, points = random.Random(0), []
    for index in range(POINTS):
        if method == "prefix":
            # Half of the points have an MLP. The space is `DEFAULT_SPACE` in training/search_space.py.
            mlp = index % 2 == 1
            settings = {
                "prefix_projection": mlp,
                "num_virtual_tokens": round(log_uniform(chance, 4, 128)),
                "prefix_dropout": round(chance.uniform(0.0, 0.3), 2),
            }
            rate = log_uniform(chance, 1e-4, 3e-3) if mlp else log_uniform(chance, 3e-3, 2e-1)
        elif method == "lora":
            rank = round(log_uniform(chance, 2, 32))
            settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": round(chance.uniform(0.0, 0.3), 2)}
            rate = log_uniform(chance, 3e-4, 2e-2)
        else:
            settings, rate = {}, log_uniform(chance, 1e-5, 5e-4)
        points.append((settings, rate))
    return points


def run(args, name, method, point, seed):
    """Do one training run, unless it is finished; return its results."""
    settings, rate = ({}, None) if point == DEFAULT else points_of(method)[point]
    adapter = {**METHODS[method][1], **settings}
    if method == "lora" and point == DEFAULT:
        adapter |= {"r": 8, "lora_alpha": 16}  # PEFT's default of `lora_alpha` is half of this
    recipe = replace(
        learning.recipe_of(args, name, "full" if method == "full" else "table", 1e-2, seed),
        adapter=adapter,
        learning_rate=rate,
        head_learning_rate=None,
        output_dir=str(args.output / "defaults" / name / method / str(point) / f"seed-{seed}"),
    )
    return learning.train_once(recipe)


def next_runs(args, known):
    """Yield the runs that can start, the most important first."""
    for method in args.methods:
        for name in args.pairs:
            yield from ((name, method, DEFAULT, seed) for seed in args.seeds)
            tried = [(name, method, point, learning.SELECTION_SEED) for point in range(POINTS)]
            yield from tried
            if known.keys() >= set(tried):
                best = max(tried, key=lambda key: known[key]["validation"])[2]
                yield from ((name, method, best, seed) for seed in args.seeds)


def study(args):
    """Do all runs that `--results` does not have yet."""
    for name in args.pairs:  # before the processes need the files
        learning.data_files(args, learning.PAIRS[name])
    runs.run_all(args.results, args.jobs, lambda known: next_runs(args, known), lambda key: (run, args, *key))


def report(args):
    """Print the table of the finished runs, in Markdown."""
    known = runs.read(args.results)
    print("| pair | method | defaults | best of 12 | difference | its settings |\n|---|---|---|---|---|---|")
    for name in args.pairs:
        for method in args.methods:
            tried = {
                point: known[key]["validation"]
                for point in range(POINTS)
                if (key := (name, method, point, learning.SELECTION_SEED)) in known
            }
            scores = {
                point: {
                    seed: known[name, method, point, seed]["test"]
                    for seed in args.seeds
                    if (name, method, point, seed) in known
                }
                for point in (DEFAULT, *tried)
            }
            default, best = scores[DEFAULT], scores[max(tried, key=tried.get)] if len(tried) == POINTS else {}
            if not default and not best:
                continue
            cells = [learning.mean_and_spread(list(each.values())) if each else "" for each in (default, best)]
            both = [default[seed] - best[seed] for seed in default if seed in best]
            cells.append(f"{statistics.mean(both):+.2%}" if both else "")
            settings, rate = points_of(method)[max(tried, key=tried.get)] if best else ({}, "")
            text = ", ".join(f"{key} {value}" for key, value in settings.items())
            print(f"| {name} | {METHODS[method][0]} | {' | '.join(cells)} | {text}{', ' if text else ''}rate {rate} |")


def main():
    """Run the command."""
    parser = runs.new_parser(__doc__, Path(__file__).with_name("defaults_results.jsonl"))
    learning.add_run_options(parser)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.study_or_report(parser, study, report)


if __name__ == "__main__":
    main()
