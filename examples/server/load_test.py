"""Mixed batches beside one adapter at a time: the example server under load, on this machine.

    python examples/server/load_test.py --classifier MODEL --generator MODEL --report docs/serving-load.md

For each number of adapters random ones are made for the base model, as large as trained ones. Three servers are
started: one mixes adapters in a batch; one switches from adapter to adapter, with all requests that wait for it in a
batch; one switches from request to request. Closed-loop clients, which draw an adapter for each request, ask one
server, then the next, in turns. With one adapter the first two do the same: how far they are apart there says how
exact the figures are.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from http.client import HTTPConnection
from pathlib import Path

import torch
import transformers
from peft import get_peft_model

from prefix_adapter import PrefixTuningV2Config

CLASSES = {
    "classify": ("classifier", transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
    "generate": ("generator", transformers.AutoModelForCausalLM, "CAUSAL_LM"),
}
# The servers that are compared: what each is called, and started with.
SERVERS = {
    "mixed": ("mixed", []),
    "by_adapter": ("switching, a batch for each adapter", ["--one-adapter-a-batch"]),
    "by_request": ("switching for each request", ["--max-batch", "1"]),
}
TEXT = "I still have not received my new card, when will it arrive?"
BODIES = {
    "classify": {"text": TEXT},
    "generate": {"prompt": "Once upon a time there was a", "max_new_tokens": 64},
}


def make_adapters(folder: Path, name: str, path: str, count: int) -> None:
    """Random adapters of 20 tokens for a base model."""
    _, auto_class, task_type = CLASSES[path]
    config = PrefixTuningV2Config(task_type=task_type, num_virtual_tokens=20, init_std=0.3)
    for number in range(count):
        torch.manual_seed(number)
        get_peft_model(auto_class.from_pretrained(name), config).save_pretrained(folder / f"{path}-{number}")


def start(args: argparse.Namespace, adapters: Path, path: str, options: list[str]) -> tuple[subprocess.Popen, str]:
    """A server, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    option = CLASSES[path][0]
    command = [sys.executable, str(Path(__file__).with_name("app.py")), "--adapters", str(adapters), "--threads", "1"]
    command += [f"--{option}", getattr(args, option), "--port", str(port)]
    server = subprocess.Popen(command + options)
    address = f"127.0.0.1:{port}"
    for _ in range(240):
        try:
            http = HTTPConnection(address)
            http.request("GET", "/adapters")
            http.getresponse().read()
            return server, address
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit("The server did not start.")


def load(address: str, path: str, adapters: int, clients: int, seconds: float) -> tuple[int, list[float]]:
    """How many requests were answered within the time, and the seconds of all that were asked in it.

    Clients ask again when they are answered.
    """
    answered: list[bool] = []
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        # The standard library's: httpx, which looks through all connections for each request, would be the bottleneck.
        http = HTTPConnection(address, timeout=120)
        # Drawn: clients that went through the adapters in order, and were answered together, would ask for the same.
        drawn = random.Random(number)
        while (started := time.perf_counter()) < end:
            body = json.dumps({**BODIES[path], "adapter": f"{path}-{drawn.randrange(adapters)}"})
            http.request("POST", f"/{path}", body, {"Content-Type": "application/json"})
            answer = http.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {text!r}")
            finished = time.perf_counter()
            answered.append(finished <= end)
            latencies.append(finished - started)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return sum(answered), latencies


def measure(args: argparse.Namespace, path: str) -> list[dict]:
    """The servers at each number of adapters."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder), getattr(args, CLASSES[path][0]), path, max(args.counts))
        servers = {name: start(args, Path(folder), path, options) for name, (_, options) in SERVERS.items()}
        try:
            for clients, count in itertools.product(args.clients, args.counts):
                rates: dict[str, list[float]] = {name: [] for name in SERVERS}
                waits: dict[str, list[float]] = {name: [] for name in SERVERS}
                for turn in range(args.turns + 1):
                    for name, (_, address) in servers.items():
                        seconds = args.seconds if turn else 1.0  # the first turn loads the adapters
                        number, latencies = load(address, path, count, clients, seconds)
                        if turn:
                            rates[name].append(number / seconds)
                            waits[name] += latencies
                result = {"path": path, "clients": clients, "adapters": count}
                for name in SERVERS:
                    result[name] = {
                        "requests_per_second": statistics.median(rates[name]),
                        "spread": max(rates[name]) - min(rates[name]),
                        "p95_seconds": statistics.quantiles(waits[name], n=20)[-1],
                    }
                print(json.dumps(result), flush=True)
                results.append(result)
        finally:
            for server, _ in servers.values():
                server.terminate()
                server.wait()
    return results


def report(args: argparse.Namespace, results: list[dict]) -> str:
    """The figures as a page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", check=False
    )
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    columns = ["request", "clients", "adapters", "mixed, requests/s"]
    columns += [f"{words}, requests/s (mixed over it)" for name, (words, _) in SERVERS.items() if name != "mixed"]
    columns += ["95% of requests within, s"]
    lines = [
        "# The example server under load",
        "",
        "<!-- Written by examples/server/load_test.py. -->",
        "",
        f"Clients on the same machine ({machine}), each with one request at a time; one torch thread; batches of up "
        f"to 64; adapters of 20 tokens; median of {args.turns} turns of {args.seconds:g} s, the servers in turns, "
        f"and half the distance of the fastest and slowest; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {commit.stdout.strip()}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for each in results:
        rates = {name: each[name]["requests_per_second"] for name in SERVERS}
        cells = [each["path"], str(each["clients"]), str(each["adapters"])]
        for name, rate in rates.items():
            ratio = "" if name == "mixed" else f" ({rates['mixed'] / rate:.1f})"
            cells.append(f"{rate:.0f} ± {each[name]['spread'] / 2:.0f}{ratio}")
        cells.append(", ".join(f"{each[name]['p95_seconds']:.2f}" for name in SERVERS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classifier", help="base model for /classify")
    parser.add_argument("--generator", help="base model for /generate")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64], help="numbers of adapters")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="numbers of clients")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write the figures as a page")
    args = parser.parse_args()
    paths = [path for path, (option, *_) in CLASSES.items() if getattr(args, option)]
    if not paths:
        parser.error("give --classifier or --generator, or both")
    results = [result for path in paths for result in measure(args, path)]
    page = report(args, results)
    print(page)
    if args.report:
        args.report.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
