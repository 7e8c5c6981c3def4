"""examples/speech_to_text.py, run as a user runs it, with fewer steps."""

import re

import pytest
from programs import example


@pytest.mark.slow
def test_a_prefix_helps_whisper_against_a_hum(tmp_path):
    shown = example("speech_to_text.py", "--output", tmp_path / "adapter", "--base-steps", 120, "--steps", 60)
    base, before, after, without, saved = (int(part) for part in re.findall(r"(\d+)% right", shown))
    assert before + 10 < after and before + 10 < base
    assert saved == after and without == base
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
