"""How much of a text a prefix holds: trained by distillation, trained on next tokens, or the first tokens alone.

    python benchmarks/documents.py --model FOLDER --output runs/documents
    python benchmarks/documents.py --results documents.jsonl --report

The text is document.txt, about 2,100 tokens that no model has seen. The model (a chat model) asks itself questions
about it and answers them. A part of the questions is held out. On these the script measures the Kullback-Leibler
divergence per token of an answer, from the model behind the whole text to the model behind a prefix. The work is
resumable: finished runs are in `--results` and are not repeated, an interrupted one continues.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LENGTHS = (32, 128, 512)
# The most telling ones first.
RUNS = [
    ("no text", 0),
    *(("first tokens", n) for n in LENGTHS),
    ("distilled", 128),
    ("next tokens", 128),
    ("distilled", 512),
    ("distilled", 32),
    ("next tokens", 32),
    ("next tokens", 512),
]
TITLES = {
    "no text": "no prefix, no text",
    "first tokens": "the first n tokens of the text",
    "next tokens": "trained on the text's next tokens",
    "distilled": "distilled (`distil`)",
}


def recipes(args, arm, n):
    """The recipe of a run; that of the task `distil` also measures the divergence of the others."""
    from prefix_adapter.training import Data, Recipe

    adapter = {"num_virtual_tokens": n, "num_frozen_tokens": 1, "prefix_dropout": 0.0} if n else {"peft_type": "NONE"}
    rows = {"train": str(args.output / "train.jsonl"), "validation": str(args.output / "held-out.jsonl")}
    settings = {"learning_rate": args.rate, "lr_scheduler_type": "linear", "warmup_ratio": 0.06}
    settings |= {"mixed_precision": "bf16", "num_train_epochs": 1000, "model": str(args.model)}
    settings |= {"output_dir": str(args.output / f"{arm.replace(' ', '-')}-{n}"), "eval_batch_size": 8}
    measure = Recipe(
        task="distil", data=Data(**rows), adapter=adapter, batch_size=8, max_length=160, max_steps=args.steps,
        eval_steps=args.steps, save_steps=20, **settings,
    )  # fmt: skip
    if arm != "next tokens":
        return measure, measure
    rows = {name: str(args.output / "text.jsonl") for name in ("train", "validation")}
    context = json.loads((args.output / "text.jsonl").read_text(encoding="utf-8"))["text"]
    # A step has about as many tokens as one of the distillation, with the teacher's.
    train = Recipe(
        task="causal-lm", data=Data(**rows), adapter=adapter, batch_size=4, max_length=256, init_text=context,
        max_steps=args.steps, eval_steps=args.steps, save_steps=20, **settings,
    )  # fmt: skip
    return train, measure


def prepare(args):
    """Make the questions, and divide them."""
    from prefix_adapter.training import SelfStudy, load_recipe, self_study

    text = Path(__file__).with_name("document.txt").read_text(encoding="utf-8")
    recipe = load_recipe("distil", model=str(args.model), mixed_precision="bf16")
    settings = SelfStudy(args.questions, question_tokens=32, answer_tokens=40)
    file = self_study(text, args.output / "questions.jsonl", recipe, settings)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (args.output / "held-out.jsonl").write_text("".join(lines[: args.held_out]), encoding="utf-8")
    (args.output / "train.jsonl").write_text("".join(lines[args.held_out :]), encoding="utf-8")
    context = json.loads(lines[0])["context"]
    (args.output / "text.jsonl").write_text(json.dumps({"text": context}) + "\n", encoding="utf-8")


def run(args, arm, n):
    """Train an arm if it is trained, and measure it."""
    from accelerate import Accelerator

    from prefix_adapter import PeftModel, init_from_text
    from prefix_adapter.training.data import load_rows
    from prefix_adapter.training.evaluation import evaluate
    from prefix_adapter.training.model import load_base, load_tokenizer, wrap
    from prefix_adapter.training.run import train
    from prefix_adapter.training.tasks import TASK_CLASSES

    started = time.perf_counter()
    recipe, measure = recipes(args, arm, n)
    line = {"arm": arm, "n": n}
    folder = Path(recipe.output_dir)
    if arm in ("distilled", "next tokens"):
        results = train(recipe, resume=(folder / "recipe.yaml").exists(), quiet=False)
        line |= {"steps": results["steps"], "rate": args.rate, "seconds": round(time.perf_counter() - started)}
    task = TASK_CLASSES["distil"](measure, load_tokenizer(measure))
    base, _ = load_base(measure, task)
    if arm in ("distilled", "next tokens"):
        model = PeftModel.from_pretrained(base, str(folder))
    else:
        model = wrap(measure, task, base, [])
        if n:
            context = json.loads((args.output / "text.jsonl").read_text(encoding="utf-8"))["text"]
            init_from_text(model, context, tokenizer=task.tokenizer, truncate=True)
    accelerator = Accelerator(mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    rows = load_rows(measure.data, "validation")
    metrics, _ = evaluate(task, prepared, rows, measure.eval_batch_size, accelerator)
    config = base.config
    size = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    return {**line, "divergence": round(metrics["loss"], 4), "rows": len(rows), "cache_bytes": n * size}


def speeds(args):
    """Tokens per second of greedy search behind prefixes and behind the text, which is read once, for one prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefix_adapter import PrefixTuningV2Config, get_peft_model, init_from_text

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    context = json.loads((args.output / "text.jsonl").read_text(encoding="utf-8"))["text"]
    ids, count = tokenizer(context, add_special_tokens=False)["input_ids"], 32
    prompt = json.loads((args.output / "held-out.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    prompt = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    whole = torch.cat([torch.tensor([ids]), prompt], dim=1)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    model = None
    for n in LENGTHS:
        config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=n)
        if model is None:
            model = get_peft_model(base, config, adapter_name=str(n))
        else:
            model.add_adapter(str(n), config)
        init_from_text(model, ids, str(n), truncate=True)
    model.eval()

    def once(n):
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        started = time.perf_counter()
        if n:
            model.set_adapter(str(n))
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        else:
            with model.disable_adapter():
                model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **settings)
        return count / (time.perf_counter() - started)

    found = {n: [] for n in (*LENGTHS, 0)}
    with torch.no_grad():
        for _ in range(5):  # in turn, so that a change of the machine's load meets all of them
            for n, values in found.items():
                values.append(once(n))
    return {
        "arm": "speed",
        "tokens_per_second": {str(n): round(statistics.median(values), 2) for n, values in found.items()},
        "text_tokens": len(ids),
        "prompt_tokens": prompt.shape[1],
    }


def report(lines):
    """The results as tables in Markdown."""
    cells = {(line["arm"], line["n"]): f"{line['divergence']:.3f}" for line in lines if "divergence" in line}
    head = ["| | " + " | ".join(f"n = {n}" for n in LENGTHS) + " |", "|---" * (len(LENGTHS) + 1) + "|"]
    rows = [
        f"| {TITLES[arm]} | " + " | ".join(cells.get((arm, n), "") for n in LENGTHS) + " |"
        for arm in ("first tokens", "next tokens", "distilled")
    ]
    rows.append(f"| {TITLES['no text']} | " + " | ".join([cells.get(("no text", 0), "")] * len(LENGTHS)) + " |")
    return "\n".join([*head, *rows])


def main():
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Folder or name of a chat model.")
    parser.add_argument("--output", type=Path, default=Path("runs/documents"), help="Folder for questions and runs.")
    parser.add_argument(
        "--results", type=Path, help="JSON lines of the results (default: results.jsonl in the output)."
    )
    parser.add_argument("--questions", type=int, default=176)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="Print the tables of the results and do no more.")
    args = parser.parse_args()
    args.results = args.results or args.output / "results.jsonl"
    lines = (
        [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
        if args.results.exists()
        else []
    )
    if args.report:
        print(report(lines))
        return
    import torch

    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    prepare(args)
    done = {(line["arm"], line.get("n")) for line in lines}
    for arm, n in RUNS:
        if (arm, n) not in done:
            line = run(args, arm, n)
            print(line, flush=True)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    if ("speed", None) not in done:
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(speeds(args)) + "\n")


if __name__ == "__main__":
    main()
