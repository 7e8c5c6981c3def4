"""The device, its precisions, and a description of the machine.

A section is a function that yields pairs of a name and a check. A check is a function. It receives a dictionary to
fill with figures, and raises an error if something is wrong, or `Skip` if it cannot run here.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import torch

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def device_of(args):
    """Return the GPU, or the CPU with `--tiny`."""
    return torch.device("cpu" if args.tiny else "cuda")


@contextlib.contextmanager
def arithmetic(precision):
    """Use TF32 in matrix products if `precision` is `"tf32"`, else full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device, precision):
    """Return the autocast context of a training step."""
    return torch.autocast(device.type, HALF[precision]) if precision in HALF else nullcontext()


# ---- The machine


def environment(args):
    """Record the machine and the versions."""

    def call(figures):
        names = ("torch", "transformers", "peft", "accelerate", "numpy", "triton", "datasets", "flash-attn", "pytest")
        versions = {}
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        figures |= {"python": platform.python_version(), "versions": versions, "cpus": os.cpu_count()}
        import prefix_adapter

        figures["package"] = str(Path(prefix_adapter.__file__).parent)
        if args.tiny:
            figures["device"] = "cpu"
            return
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here; --tiny runs the command on a CPU")
        properties = torch.cuda.get_device_properties(0)
        figures |= {"device": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}
        figures |= {"capability": list(torch.cuda.get_device_capability()), "cudnn": torch.backends.cudnn.version()}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
            figures["driver"] = subprocess.run(
                query, capture_output=True, encoding="utf-8", check=False
            ).stdout.strip()

    yield "machine", call
