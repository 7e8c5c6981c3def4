"""What `bash benchmarks/gpu.sh` runs. This file imports no torch: the process that watches the others reads it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Skip(Exception):
    """A check that cannot run here; the message is the reason."""
