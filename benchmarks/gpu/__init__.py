"""The checks of `bash benchmarks/gpu.sh`. This file does not import torch, as the supervising process reads it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Skip(Exception):
    """Raised by a check that cannot run here; the message is the reason."""
