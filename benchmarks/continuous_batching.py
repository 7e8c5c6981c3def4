"""Measure continuous batching with a prefix beside the base model in the same engine, and beside `generate`.

    python benchmarks/continuous_batching.py --model HuggingFaceTB/SmolLM2-135M

Requests of different lengths are answered greedily, each with the same number of new tokens. The arms take turns in
one process, in a new random order each round. The figures are tokens per second, and the quartiles of the ratios of
each round: of the time that passed, and of the processor's time, which other programs on the machine disturb less.
"""

import argparse
import json
import os
import random
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from prefix_adapter import PrefixTuningV2Config, get_peft_model


def generate_in_batches(model, prompts, config, size):
    """Return the tokens of `generate` on batches in the order of the requests, padded on the left."""
    tokens = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part], device=model.device)
        tokens += model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    return tokens


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a decoder: a folder, or a name on the Hub")
    parser.add_argument("--virtual_tokens", type=int, default=20)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument(
        "--prompt", type=int, nargs=2, default=(16, 128), help="shortest and longest prompt, in tokens"
    )
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8, help="requests at a time, and rows of a batch of `generate`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = AutoModelForCausalLM.from_pretrained
    base, inner = (load(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval() for _ in range(2))
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=args.virtual_tokens, init_std=0.5)
    model = get_peft_model(inner, config).eval()
    order = random.Random(0)
    lengths = [order.randint(*args.prompt) for _ in range(args.requests)]
    prompts = [[order.randrange(1000, 5000) for _ in range(length)] for length in lengths]
    greedy = GenerationConfig(
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    # Room for all slots at their longest, in blocks of 32 tokens.
    blocks = 2 * args.slots * (args.prompt[1] + args.new_tokens + 31) // 32
    engine = {"page_size": 32, "num_blocks": blocks, "max_batch_tokens": 256, "max_requests_per_batch": args.slots}

    def run_engine(wrapped):
        settings = ContinuousBatchingConfig(**engine, auto_switch_to_flash=False)
        results = wrapped.generate_batch(prompts, greedy, continuous_batching_config=settings, warmup=False)
        if any(result.error for result in results.values()):
            raise SystemExit(next(result.error for result in results.values() if result.error))
        return [result.generated_tokens for result in results.values()]

    arms = {
        "base, continuous": lambda: run_engine(base),
        "prefix, continuous": lambda: run_engine(model),
        "prefix, generate": lambda: generate_in_batches(model, prompts, greedy, args.slots),
    }
    seconds, processor, answers = {arm: [] for arm in arms}, {arm: [] for arm in arms}, {}
    for number in range(args.rounds + 1):
        for arm in order.sample(list(arms), len(arms)):
            started, begun = time.perf_counter(), time.process_time()
            answers[arm] = arms[arm]()
            if number:  # the first round warms up
                seconds[arm].append(time.perf_counter() - started)
                processor[arm].append(time.process_time() - begun)
    tokens = args.requests * args.new_tokens
    assert all(sum(map(len, found)) == tokens for found in answers.values())
    report = {
        "tokens_per_second": {arm: round(tokens / statistics.median(found), 1) for arm, found in seconds.items()}
    }
    for other in ("base, continuous", "prefix, generate"):
        for clock, times in (("time", seconds), ("processor time", processor)):
            pairs = zip(times[other], times["prefix, continuous"], strict=True)
            quartiles = statistics.quantiles([theirs / own for theirs, own in pairs], n=4)
            report[f"rate relative to {other}, {clock}"] = [round(each, 3) for each in quartiles]
    report["texts equal to generate"] = sum(
        one == two for one, two in zip(answers["prefix, continuous"], answers["prefix, generate"], strict=True)
    )
    print(json.dumps({**vars(args), **report}, indent=1))


if __name__ == "__main__":
    main()
