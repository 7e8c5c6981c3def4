"""examples/speech_to_text.py, run as a user runs it, with fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_prefix_helps_whisper_against_a_hum(tmp_path):
    script, steps = ROOT / "examples" / "speech_to_text.py", ("--base-steps", "120", "--steps", "60")
    done = subprocess.run(
        [sys.executable, script, "--output", tmp_path / "adapter", *steps],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    base, before, after, without, saved = (int(part) for part in re.findall(r"(\d+)% right", done.stdout))
    assert before + 10 < after and before + 10 < base
    assert saved == after and without == base
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
