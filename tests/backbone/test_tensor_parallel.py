"""Tensor parallelism is refused: a process would take its share of the heads for all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_refused(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*command, worker, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    refused = "LlamaForCausalLM is divided over 2 processes by tensor parallelism, which a prefix does not support."
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        # FSDP2 comes after wrapping (see test_distributed.py), and is not mistaken for tensor parallelism before it.
        assert found["left behind"] == [] and "tensor parallelism" not in found["FSDP2"], found
        for way in ("wrap", "load", "by hand"):
            assert found[way].startswith(refused), (way, found)
