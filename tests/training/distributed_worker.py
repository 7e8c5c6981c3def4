"""Runs several training runs in the processes that a launcher started, to start them only once for many tests.

    accelerate launch ... distributed_worker.py JOBS.json

JOBS.json is a list of jobs, done one after the other. What the processes saw is in `NAME-RANK.json` beside it. A job:

    name         its name
    recipe       the arguments of `Recipe`, or with `tasks` the values of a `JointRecipe`
    only         {rank: values of the recipe that only this process has}
    folder       {rank: a working directory}
    resume       go on with the run
    interrupt    [rank, step]: this process gets a SIGTERM then
    wait         the step before which all processes wait for signals
    disk_full    the main process cannot write checkpoints
"""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch

if any(os.environ.get(f"ACCELERATE_USE_{each}") == "true" for each in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")):
    # Accelerate has them on GPUs only; PyTorch and DeepSpeed have them on CPUs too.
    from accelerate.state import DistributedType, PartialState

    deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false")
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ["ACCELERATE_USE_DEEPSPEED"] = deepspeed
    del os.environ["ACCELERATE_USE_CPU"]

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prefix_adapter.training import (
    JointRecipe,
    Recipe,
    TrainingInterrupted,
    checkpoint,
    reports,
    train,
    train_together,
)
from prefix_adapter.training import run as run_module
from prefix_adapter.training.loop import Loop

torch.set_num_threads(1)
reports.draw_curve = lambda *args: None  # takes longer than a tiny run
rank = int(os.environ["RANK"])
jobs_file = Path(sys.argv[1])


class WatchedLoop(Loop):
    """Records what is sharded, what is sent, and what each process has trained."""

    job: dict
    seen: dict

    def __init__(self, *args):
        super().__init__(*args)
        seen = self.seen
        seen["reduced_bytes"] = []
        parameters = list(self.model.parameters())
        seen["numel"] = sum(parameter.numel() for parameter in parameters)
        seen["kept_numel"] = sum(
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel() for parameter in parameters
        )
        if isinstance(self.model, DistributedDataParallel):

            def count(state, bucket):
                seen["reduced_bytes"].append(bucket.buffer().nbytes)
                return allreduce_hook(state, bucket)

            self.model.register_comm_hook(None, count)

    def run(self):
        super().run()
        own = [parameter for parameter in self.parameters if not isinstance(parameter, DTensor)]
        bits = b"".join(parameter.detach().numpy().tobytes() for parameter in own)
        self.seen["trained"] = hashlib.sha256(bits).hexdigest()

    def _train_step(self, batch):
        if self.job.get("interrupt") == [rank, self.step]:
            signal.raise_signal(signal.SIGTERM)
        if self.job.get("wait") == self.step:
            jobs_file.with_name(f"waiting-{rank}").write_text(str(os.getpid()))
            deadline = time.monotonic() + 240
            while self._signal is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)  # for the second signal
        return super()._train_step(batch)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(settings: dict, resume: bool) -> dict:
    if "tasks" in settings:
        return train_together(JointRecipe.from_dict(settings), resume=resume)
    return train(Recipe.from_dict(settings), resume=resume)


def do(job: dict) -> dict:
    settings = {**job["recipe"], **job.get("only", {}).get(str(rank), {})}
    os.chdir(job.get("folder", {}).get(str(rank), jobs_file.parent))
    WatchedLoop.job, WatchedLoop.seen = job, (seen := {})
    with mock.patch.object(run_module, "Loop", WatchedLoop):
        try:
            with mock.patch.object(
                checkpoint, "save_file", no_space if job.get("disk_full") else checkpoint.save_file
            ):
                seen["results"] = run(settings, resume=job.get("resume", False))
        except TrainingInterrupted as error:
            print(error, flush=True)
            seen["error"] = [type(error).__name__, str(error)]
        except Exception as error:
            seen["error"] = [type(error).__name__, str(error)]
    return seen


# A run ends the process group. The next job needs it.
with mock.patch.object(torch.distributed, "destroy_process_group"):
    for each in json.loads(jobs_file.read_text()):
        report = do(each)
        jobs_file.with_name(f"{each['name']}-{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
