"""Kill and resume training runs: a loop with Accelerate, and the command `prefix-adapter train`."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from functools import partial
from pathlib import Path
from unittest import mock

import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import ROOT, Skip
from gpu.common import HALF, device_of
from gpu.references import test_module
from prefix_adapter import PrefixTuningV2Config, get_peft_model

N = 5
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "initializer_range": 0.06}


@contextlib.contextmanager
def fresh_accelerate():
    """Reset Accelerate's state afterwards: it keeps the precision and device of the first Accelerator of a process."""
    try:
        yield
    finally:
        state = sys.modules.get("accelerate.state")
        if state is not None:
            # Private, because accelerate has no public function for it. The tests' conftest.py does the same.
            state.AcceleratorState._reset_state(reset_partial_state=True)


STEPS, KILLED_AT = 12, 7


def train_loop(folder, device, precision, die=False):
    """Train like a user's own loop with Accelerate: save a checkpoint every third step, start from the last one.

    Returns:
        The trained parameters before and after training, by name, and the losses of the steps of this call.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(
        mixed_precision=precision if precision in HALF else "no", cpu=device.type == "cpu", rng_types=["torch"]
    )
    assert accelerator.device.type == device.type, f"Accelerate runs on {accelerator.device}, not on {device}"
    set_seed(0)
    base = tiny.model("bert", "AutoModelForSequenceClassification", **SIZES)
    config = PrefixTuningV2Config(
        task_type="SEQ_CLS", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=16, prefix_dropout=0.1
    )
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def state():
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

    first = state()
    saved = sorted(folder.glob("step-*"))
    start = 0
    if saved:
        accelerator.load_state(str(saved[-1]))
        start = int(saved[-1].name.partition("-")[2])
    rows = tiny.ids(8 * STEPS, 16, seed=5).to(accelerator.device)
    losses = []
    for step in range(start, STEPS):
        ids = rows[8 * step : 8 * step + 8]
        # Other kernels sum gradients in an order that changes from run to run.
        with accelerator.autocast(), sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=ids, labels=(ids[:, 0] > tiny.VOCAB // 2).long()).loss
        accelerator.backward(loss)
        if die and step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)  # between the backward pass and the step
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 3 == 0:
            accelerator.save_state(str(folder / f"step-{step + 1:03d}"))
    return first, state(), losses


@contextlib.contextmanager
def child(*command):
    """Start a process and kill it on exit."""
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def resumed(args, precisions):
    """Check in each precision that a killed and resumed run ends with the weights of an uninterrupted run."""
    for precision in precisions[:1] if args.tiny else precisions:
        yield f"loop with Accelerate, {precision}", partial(killed_and_resumed, args, precision)


def killed_and_resumed(args, precision, figures):
    """Kill a run in another process, resume it here, and compare it with an uninterrupted run."""
    if importlib.util.find_spec("accelerate") is None:
        raise Skip("needs accelerate")
    device = device_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        whole, parts = Path(scratch, "whole"), Path(scratch, "parts")
        code = "import sys, pathlib, torch, gpu.training; torch.set_num_threads(1); "
        code += "gpu.training.train_loop(pathlib.Path(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3], die=True)"
        with child(sys.executable, "-c", code, str(parts), device.type, precision) as killed:
            with fresh_accelerate():
                first, expected, losses = train_loop(whole, device, precision)
            assert killed.wait() == -signal.SIGKILL, f"the run ended with {killed.returncode} before it was killed"
        assert sorted(path.name for path in parts.iterdir()) == ["step-003", "step-006"]
        with fresh_accelerate():
            _, found, resumed = train_loop(parts, device, precision)
    assert len(resumed) == STEPS - 6 and found.keys() == expected.keys()
    figures["same to the bit"] = all(torch.equal(found[name], expected[name]) for name in found)
    figures["losses"] = [round(loss, 4) for loss in losses]
    # Relative to the change by training. With other dropout, or without the moments, the error is a third of it.
    moved = max((expected[name] - first[name]).abs().max().item() for name in first)
    off = max((expected[name] - found[name]).abs().max().item() for name in first)
    figures["error"] = off / moved
    assert moved > 1e-3 and all(map(math.isfinite, losses)), f"the weights were not trained: {losses}"
    assert figures["error"] <= 0.02, f"an error of {figures['error']:.3g}, relative to the change by training"


# ---- The command


def missing_packages(extra="train"):
    """Return the missing packages of an extra, including the requirements of its packages."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(line) for line in project["optional-dependencies"][extra]]
    seen, missing = set(), []
    while waiting:
        requirement = waiting.pop(0)
        key = requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        for need in map(Requirement, needs):
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": each}) for each in extras):
                waiting.append(need)
    return sorted(set(missing))


def training_command(args):
    """Run `prefix-adapter train`, kill it, resume it, and predict with the adapter."""

    def call(figures):
        missing = missing_packages()
        if missing:
            raise Skip(f"needs {', '.join(missing)}: pass a folder with their wheels as --wheels FOLDER")
        rows = test_module("training/conftest")
        with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(os.environ):
            # Otherwise the rows would stay in the user's own cache.
            os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"
            _train_by_command(figures, args, rows, Path(scratch))

    call.limit = 120
    yield "train, kill, resume, predict", call


def _train_by_command(figures, args, rows, folder):
    base = rows.save_base(folder / "base", "bert")
    data = {"train": rows.topic_rows(96), "validation": rows.topic_rows(32, 200)}
    options = ["--config", "sequence-classification", "--model", base, "--adapter.num_virtual_tokens", "4"]
    for name, own in data.items():
        options += [f"--data.{name}", rows.write_rows(folder / f"{name}.jsonl", own)]
    options += ["--num_train_epochs", "8", "--eval_steps", "6", "--batch_size", "8", "--max_length", "16"]
    options += ["--mixed_precision", "no" if args.tiny else "bf16"]

    def command(*arguments):
        from prefix_adapter.cli import main

        with fresh_accelerate():
            try:
                main(list(arguments))
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"prefix-adapter {arguments[0]}: {ended.code}") from ended

    # One run is killed. Meanwhile this process runs another one without interruption.
    parts = str(folder / "parts")
    with child(sys.executable, "-m", "prefix_adapter", "train", *options, "--output_dir", parts) as killed:

        def kill():
            # A run can resume only after it has a complete checkpoint.
            while killed.poll() is None and not list((folder / "parts").glob("checkpoints/step-*")):
                time.sleep(0.02)
            killed.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        if not args.tiny:
            command("train", *options, "--output_dir", str(folder / "whole"))
        killer.join()
        status = killed.wait()
    assert status == -signal.SIGKILL, f"the run ended before it was killed, with status {status}"
    command("train", "--resume", parts)
    for name in ("parts",) if args.tiny else ("parts", "whole"):
        results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        figures[name] = {**results["validation"], "steps": results["steps"], "seconds": results["seconds"]}
        assert figures[name]["accuracy"] > 0.9, f"{name}: {figures[name]}"
    answers = folder / "answers.jsonl"
    command("predict", parts, str(folder / "validation.jsonl"), str(answers))
    figures["answers"] = len(answers.read_text(encoding="utf-8").splitlines())
    assert figures["answers"] == len(data["validation"])
    if not args.tiny:
        figures["bytes on the GPU"] = torch.cuda.max_memory_allocated()
        assert figures["bytes on the GPU"] > 0
