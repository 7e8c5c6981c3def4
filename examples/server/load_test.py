"""Load test of the example server: mixed batches compared with one adapter at a time, on this machine.

    python examples/server/load_test.py --classifier MODEL --generator MODEL --report docs/serving-load.md

For each number of adapters the test creates random adapters of the size of trained ones, with heads of different
sizes. It starts three servers: one mixes adapters in a batch, one puts only requests for one adapter into a batch, and
one makes a batch of each request. Closed-loop clients draw an adapter and a text for each request and use the servers
in turns. With one adapter the first two servers do the same, so the difference between them shows the precision of the
figures.

Each answer is compared with the answer of the adapter alone on its model. Some requests are invalid and must get the
right status. For some requests the client closes the connection at once. `--seconds` and `--requests` limit a run. The
exit status is 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model

from prefix_adapter import PrefixTuningV2Config

CLASSES = {
    "classify": ("classifier", transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
    "generate": ("generator", transformers.AutoModelForCausalLM, "CAUSAL_LM"),
}
# The compared servers: name in the report, and options.
SERVERS = {
    "mixed": ("mixed", []),
    "by_adapter": ("a batch for each adapter", ["--one-adapter-a-batch"]),
    "by_request": ("a batch for each request", ["--max-batch", "1"]),
}
HEADS = [2, 3, 7, 5]  # numbers of labels of the adapters' heads, in turn; the base model has 3
TEXTS = {
    "classify": [
        "I still have not received my new card, when will it arrive?",
        "Why?",
        "The transfer that I made on Monday is still pending, and the person who is to get it asks me every day.",
    ],
    "generate": ["Once upon a time there was a", "Lily went to the park with her mum. They saw a big dog and"],
}
NEW_TOKENS = 64
# Invalid bodies and the status that each must get. One in ten requests is invalid, and one in ten is abandoned.
WRONG: list[tuple[bytes, int]] = [
    (b'{"adapter": "no-such-adapter", "%s": "w"}', 404),
    (b'{"adapter": "../../etc", "%s": "w"}', 422),
    (b'{"adapter": NaN, "%s": "w"}', 400),
    (b'{"%s": "\\ud800"}', 422),
    (b'{"%s": "' + b"a" * 30_000 + b'"}', 422),
    (b'{"%s": "' + b"a" * 300_000 + b'"}', 413),
    (b"[" * 100_000, 400),
]


@dataclass
class Tally:
    """The results of the clients of a run."""

    answered: int = 0
    latencies: list[float] = field(default_factory=list)
    rejected: int = 0
    abandoned: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the results of another run."""
        self.answered += other.answered
        self.latencies += other.latencies
        self.rejected += other.rejected
        self.abandoned += other.abandoned
        self.wrong += other.wrong


def key_of(path: str) -> str:
    """Return the key of the text in a request."""
    return "text" if path == "classify" else "prompt"


def make_adapters(folder: Path, name: str, path: str, count: int) -> dict[tuple[str, str], Any]:
    """Save the base model and random adapters of 20 tokens.

    Returns:
        (adapter, text) -> the answer of the adapter alone.
    """
    _, auto_class, task_type = CLASSES[path]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    options = {"num_labels": 3} if path == "classify" else {}
    auto_class.from_pretrained(name, **options).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = PrefixTuningV2Config(task_type=task_type, num_virtual_tokens=20, init_std=0.3)
    answers: dict[tuple[str, str], Any] = {}
    for number in range(count):
        adapter, size = f"{path}-{number}", HEADS[number % len(HEADS)]
        torch.manual_seed(number)
        options = {"num_labels": size} if path == "classify" else {}
        model = get_peft_model(auto_class.from_pretrained(name, **options), config).eval()
        model.save_pretrained(folder / "adapters" / adapter)
        labels: list[Any] = list(range(size))
        if number % 3:
            labels = [f"{adapter} {label}" for label in labels]
            (folder / "adapters" / adapter / "recipe.yaml").write_text(f"labels: {labels}\n", encoding="utf-8")
        for text in TEXTS[path]:
            answers[adapter, text] = answer_alone(model, tokenizer(text, return_tensors="pt")["input_ids"], labels)
            if path == "generate":
                answers[adapter, text] = tokenizer.decode(answers[adapter, text], skip_special_tokens=True)
    return answers


@torch.inference_mode()
def answer_alone(model: Any, ids: torch.Tensor, labels: list[Any]) -> Any:
    """Return a model's answer to a single row: label and probability, or new tokens."""
    if "CAUSAL_LM" in str(model.peft_config["default"].task_type):
        return model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    probabilities = model(input_ids=ids).logits[0].softmax(-1)
    best = int(probabilities.argmax())
    return labels[best], float(probabilities[best])


def right(path: str, expected: Any, answer: dict[str, Any]) -> bool:
    """Return whether an answer is the expected one."""
    if path == "generate":
        return answer == {"text": expected}
    return answer["label"] == expected[0] and math.isclose(answer["probability"], expected[1], abs_tol=1e-4)


def start(folder: Path, path: str, options: list[str]) -> tuple[subprocess.Popen, str]:
    """Start a server; return its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("app.py")), "--adapters", str(folder / "adapters")]
    command += ["--threads", "1", f"--{CLASSES[path][0]}", str(folder / "base"), "--port", str(port)]
    server = subprocess.Popen(command + options)
    address = f"127.0.0.1:{port}"
    for _ in range(240):
        try:
            http = HTTPConnection(address)
            http.request("GET", "/health/ready")
            http.getresponse().read()
            return server, address
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit("The server did not start.")


def load(address: str, path: str, adapters: int, answers: dict, args: argparse.Namespace, seconds: float) -> Tally:
    """Run closed-loop clients for some seconds and return their results."""
    end = time.perf_counter() + seconds
    names = [f"{path}-{number}" for number in range(adapters)]

    def client(number: int) -> Tally:
        tally = Tally()
        # Not httpx: it searches all connections for each request and would be the bottleneck.
        http = HTTPConnection(address, timeout=120)
        # Random, because clients that go through the adapters in order would soon request the same adapter together.
        drawn = random.Random(number)
        for _ in range(args.requests):
            if (started := time.perf_counter()) > end:
                break
            adapter, text, chance = drawn.choice(names), drawn.choice(TEXTS[path]), drawn.random()
            body: Any = {"adapter": adapter, key_of(path): text}
            body = json.dumps({**body, "max_new_tokens": NEW_TOKENS} if path == "generate" else body)
            if chance < 0.1:
                abandoned = HTTPConnection(address, timeout=120)
                abandoned.request("POST", f"/{path}", body, {"Content-Type": "application/json"})
                abandoned.close()
                tally.abandoned += 1
                continue
            status = 200
            if chance < 0.2:
                body, status = drawn.choice(WRONG)
                body = body.replace(b"%s", key_of(path).encode())
            http.request("POST", f"/{path}", body, {"Content-Type": "application/json"})
            response = http.getresponse()
            found = response.read()
            if response.status != status:
                tally.wrong.append(f"status {response.status} instead of {status}: {found[:200]!r}")
            elif status != 200:
                tally.rejected += 1
            else:
                finished = time.perf_counter()
                tally.answered += finished <= end
                tally.latencies.append(finished - started)
                if not right(path, answers[adapter, text], json.loads(found)):
                    tally.wrong.append(f"{adapter}, {text!r}: {found[:200]!r}, not {answers[adapter, text]!r}")
        return tally

    total = Tally()
    with ThreadPoolExecutor(args.clients) as threads:
        for tally in threads.map(client, range(args.clients)):
            total.add(tally)
    return total


def measure(args: argparse.Namespace, path: str) -> list[dict]:
    """Measure the servers with each number of adapters."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = make_adapters(folder, getattr(args, CLASSES[path][0]), path, max(args.counts))
        servers = {name: start(folder, path, options) for name, (_, options) in SERVERS.items()}
        try:
            for count in args.counts:
                rates: dict[str, list[float]] = {name: [] for name in SERVERS}
                totals = {name: Tally() for name in SERVERS}
                for turn in range(args.turns + 1):
                    for name, (_, address) in servers.items():
                        seconds = args.seconds if turn else 1.0  # the first turn loads the adapters
                        tally = load(address, path, count, answers, args, seconds)
                        totals[name].wrong += tally.wrong
                        if turn:
                            rates[name].append(tally.answered / seconds)
                            totals[name].add(tally)
                for name, total in totals.items():
                    cuts = statistics.quantiles(total.latencies, n=100)
                    result = {
                        "path": path,
                        "adapters": count,
                        "server": name,
                        "requests_per_second": statistics.median(rates[name]),
                        "spread": max(rates[name]) - min(rates[name]),
                        "seconds": [cuts[49], cuts[94], cuts[98]],
                        "compared": len(total.latencies),
                        "rejected": total.rejected,
                        "abandoned": total.abandoned,
                        "wrong": total.wrong,
                    }
                    print(json.dumps(result), flush=True)
                    results.append(result)
        finally:
            for server, _ in servers.values():
                server.terminate()
                server.wait()
    return results


def summary(results: list[dict]) -> list[str]:
    """Return what the table says of the largest number of adapters, in three sentences, a line each."""
    least, most = (limit(each["adapters"] for each in results) for limit in (min, max))
    rates = {(each["path"], each["adapters"], each["server"]): each["requests_per_second"] for each in results}
    parts = [
        f"{rates[path, most, 'mixed']:.0f} requests a second to `/{path}` ({rates[path, least, 'mixed']:.0f} with "
        f"{least}), {rates[path, most, 'mixed'] / rates[path, most, 'by_adapter']:.1f} times as many as with a batch "
        "for each adapter"
        for path in dict.fromkeys(each["path"] for each in results)
    ]
    wrong, compared = (sum(count) for count in zip(*((len(e["wrong"]), e["compared"]) for e in results), strict=True))
    return [
        f"With {most} adapters, mixed batches answer {', and '.join(parts)}.",
        "Without mixed batches the adapters wait for each other, the longer the more steps a request takes.",
        f"{wrong} of {compared:,} answers differed from those of the adapter alone.",
    ]


def report(args: argparse.Namespace, results: list[dict], before: float) -> str:
    """Return the figures as a page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", check=False
    )
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    columns = ["request", "adapters", "batches", "requests/s", "mixed / this", "median, s", "95%, s", "99%, s"]
    columns += ["compared", "wrong", "rejected", "abandoned"]
    lines = [
        "# The example server under load",
        "",
        "<!-- Written by examples/server/load_test.py. -->",
        "",
        "This page shows the throughput and latency of the [example server](serving.md#a-server) under load, for "
        "mixed batches and for batches with one adapter or one request.",
        "",
        *summary(results),
        "",
        f"- **Setup**: {args.clients} clients on the same machine ({machine}), each with one request at a time; one "
        "torch thread; batches of up to 64; adapters of 20 tokens, with heads of "
        f"{', '.join(map(str, sorted(HEADS)))} labels. Clients and servers share the cores. The machine's "
        f"load average was {before:.1f} before the start and {os.getloadavg()[0]:.1f} at the end, with this test. "
        f"torch {torch.__version__}, transformers {transformers.__version__}, commit {commit.stdout.strip()}.",
        f"- **Requests per second**: median of {args.turns} turns of {args.seconds:g} s, and half the difference of "
        "the fastest and slowest turn. The servers take turns.",
        "- **Seconds**: from sending a request to receiving its answer.",
        "- **Checks**: each answer was compared with the answer of the adapter alone. One request in ten was invalid "
        "and had to be rejected with the right status; one in ten was abandoned by its client at once.",
        *([f"- **Note**: {args.note}"] if args.note else []),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    mixed = {(each["path"], each["adapters"]): each for each in results if each["server"] == "mixed"}
    for each in results:
        rate = each["requests_per_second"]
        ratio = mixed[each["path"], each["adapters"]]["requests_per_second"] / rate
        cells = [each["path"], each["adapters"], SERVERS[each["server"]][0], f"{rate:.0f} ± {each['spread'] / 2:.0f}"]
        cells += ["" if each["server"] == "mixed" else f"{ratio:.1f}", *(f"{cut:.2f}" for cut in each["seconds"])]
        cells += [each["compared"], len(each["wrong"]), each["rejected"], each["abandoned"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classifier", help="base model for /classify")
    parser.add_argument("--generator", help="base model for /generate")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64], help="numbers of adapters")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000, help="maximum number of requests of a client in a turn")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--note", default="", help="text for the page: the models, and other load on the machine")
    parser.add_argument("--report", type=Path, help="write the figures as a page")
    args = parser.parse_args()
    paths = [path for path, (option, *_) in CLASSES.items() if getattr(args, option)]
    if not paths:
        parser.error("pass --classifier or --generator, or both")
    before = os.getloadavg()[0]
    results = [result for path in paths for result in measure(args, path)]
    page = report(args, results, before)
    print(page)
    if args.report:
        args.report.write_text(page, encoding="utf-8")
    wrong = [each for result in results for each in result["wrong"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong answers, the first: {wrong[0]}")


if __name__ == "__main__":
    main()
