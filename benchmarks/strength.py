"""Measure what a lower strength of a trained prefix gives up of its task, and what it gives back of the base model.

    python benchmarks/strength.py --adapter RUN --test test.jsonl.gz --other texts.txt

RUN is a folder that `prefix-adapter train` has written for a causal language model: a run of learning.py's pair
`smollm2-intents-text`, for instance. For each strength it prints the share of test rows that are generated exactly,
and the perplexity of other texts, one to a line, which have nothing to do with the task.
"""

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from learning import read_rows
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_adapter import PeftModel, use_strength

STRENGTHS = [0.0, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0]


@torch.no_grad()
def exact_match(model, tokenizer, rows, batch_size=50):
    """Return the share of rows whose `text` is generated after their `prompt`."""
    hits = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(text.strip() == row["text"].strip() for text, row in zip(texts, part, strict=True))
    return hits / len(rows)


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    """Return the perplexity of texts, each by itself: exp of the mean loss of all tokens but each first one."""
    loss = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = ids.shape[1] - 1
        loss += model(input_ids=ids, labels=ids).loss.item() * tokens
        count += tokens
    return math.exp(loss / count)


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder of a trained adapter")
    parser.add_argument("--test", type=Path, required=True, help="rows of its task, as .jsonl.gz")
    parser.add_argument("--other", type=Path, required=True, help="other texts, one to a line")
    parser.add_argument("--rows", type=int, default=200, help="number of rows and of texts at most")
    parser.add_argument("--dtype", default="float32", help="dtype of the base model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    rows = read_rows(args.test)
    rows = rows[:: max(len(rows) // args.rows, 1)][: args.rows]
    texts = args.other.read_text(encoding="utf-8").splitlines()[: args.rows]
    results = []
    print("| strength | exact match | perplexity of other texts |\n|---|---|---|")
    for strength in STRENGTHS:
        with use_strength(model, strength):
            results.append([strength, exact_match(model, tokenizer, rows), perplexity(model, tokenizer, texts)])
        print("| {:g} | {:.1%} | {:.2f} |".format(*results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
