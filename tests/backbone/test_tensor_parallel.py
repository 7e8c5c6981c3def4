"""Tensor parallelism: several processes with parts of the heads give the results of one process."""

import json
import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
TRAINED = ["table", "table, AdamW", "MLP", "low rank", "text", "frozen", "attention", "checkpointing"]
DIVIDED = ["llama, 4 heads", "qwen3", "gemma3", "gpt_neox", "gptj", "codegen", "mixtral", "gpt_oss", "deepseek_v2"]
DIVIDED += ["cohere2", "t5gemma"]
PIPELINE = ["pipeline"] if hasattr(DistributedConfig, "pp_size") else []


def work(rank: int, processes: int, port: int, arguments: list[str]) -> None:
    """Do what torchrun does, then run the worker."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = [str(WORKER), *arguments]
    runpy.run_path(str(WORKER), run_name="__main__")


def run(folder: Path, processes: int, jobs: list[str]) -> list[dict]:
    """What each process found, by job."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # A fork need not import everything again. If one process fails, torch ends the others and raises its error.
    torch.multiprocessing.start_processes(
        work, (processes, port, [str(folder), *jobs]), nprocs=processes, start_method="fork"
    )
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]


def assert_same_as_one_process(found: dict, job: str) -> None:
    seen = found[job]
    assert seen["losses"] < 1e-5 and seen["fall"] > 0.01, (job, seen)
    assert seen["logits"] < 1e-4 and seen["weights"] < 1e-4 and seen["same text"] and seen["same weights"], (job, seen)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = ["table", "saved", "attention", "mixed", "by hand", "FSDP2", "FSDP2, P-Tuning"]
    cases += ["P-Tuning", "P-Tuning refused", *PIPELINE]
    jobs = [*(f"llama:{case}" for case in cases), "llama, 1 head:MLP", "deepseek_v2:low rank refused"]
    return run(tmp_path_factory.mktemp("two"), 2, jobs)


@pytest.mark.parametrize("job", ["table", "attention", "mixed", "by hand", "P-Tuning"])
def test_two_processes(two, job):
    for found in two:
        assert_same_as_one_process(found, f"llama:{job}")


def test_processes_that_compute_all_heads(two):
    assert_same_as_one_process(two[0], "llama, 1 head:MLP")


def test_saved_by_one_and_by_two_processes(two):
    for found in two:
        saved = dict(found["llama:saved"])
        assert saved.pop("same config") and max(saved.values()) < 1e-4, saved


def test_refused(two):
    for found in two:
        # FSDP2 comes after wrapping (see test_distributed.py).
        for method in ("FSDP2", "FSDP2, P-Tuning"):
            message = found[f"llama:{method}"]
            assert "already divided by FSDP2" in message and "Add the adapter first" in message
        assert "divides the word embeddings of LlamaForCausalLM in hooks" in found["llama:P-Tuning refused"]
        for case in PIPELINE:
            assert "The layers of LlamaForCausalLM are divided over 2 processes" in found[f"llama:{case}"]
        message = found["deepseek_v2:low rank refused"]
        assert "tensor parallelism divides model.layers.0.self_attn" in message and "`lora_r=0`" in message


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_ways_to_train(tmp_path, processes):
    name = {2: "llama", 4: "llama, 4 heads"}[processes]
    jobs = [f"{name}:{case}" for case in [*TRAINED, "mixed", "by hand", "P-Tuning"]]
    for found in run(tmp_path, processes, jobs):
        for job in jobs:
            assert_same_as_one_process(found, job)


# Each model has processes of its own: every model that is loaded leaves process groups with their threads behind.
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", [*DIVIDED, "llama, 1 head", "llama, 2 heads", "olmo2", "phi3"])
def test_models(tmp_path, name, processes):
    jobs = [f"{name}:{case}" for case in ("table, AdamW", "attention")]
    for found in run(tmp_path, processes, jobs):
        for job in jobs:
            assert_same_as_one_process(found, job)


@pytest.mark.slow
def test_three_processes(tmp_path):
    jobs = [f"llama, 3 heads:{case}" for case in ("table, AdamW", "low rank", "attention", "mixed", "P-Tuning")]
    jobs.append("llama, 1 head:table")
    for found in run(tmp_path, 3, jobs):
        for job in jobs:
            assert_same_as_one_process(found, job)


@pytest.mark.slow
def test_fewer_heads_than_processes(tmp_path):
    for found in run(tmp_path, 4, ["llama:refused"]):
        message = found["llama:refused"]
        assert "its number of key/value heads, 2, is no multiple of the number of processes, 4" in message
