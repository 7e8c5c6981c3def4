"""torchrun ... tensor_parallel_worker.py FOLDER: what tensor parallelism and FSDP2 get, in `found-RANK.json` there."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
ids = torch.arange(5, 17).view(2, 6)


def config() -> PrefixTuningV2Config:
    return PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=5, init_std=1.0)


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )
    )  # fmt: skip


def attempt(name: str, wrap) -> None:
    try:
        wrap()
        found[name] = "taken"
    except ValueError as error:
        found[name] = str(error)


whole = get_peft_model(small(), config()).eval()
if rank == 0:
    whole.save_pretrained(folder / "adapter")
    small().save_pretrained(folder / "base")
dist.barrier()

attempt("wrap", lambda: get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto"), config()))
model = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
attempt("load", lambda: PeftModel.from_pretrained(model, str(folder / "adapter")))
found["left behind"] = [name for name, _ in model.named_modules() if "prefix" in name]

# torch's own, which transformers knows nothing of.
mesh, by_hand = init_device_mesh("cpu", (2,)), small()
for layer in by_hand.model.layers:
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(layer.self_attn, mesh, {**plan, "o_proj": RowwiseParallel()})
attempt("by hand", lambda: get_peft_model(by_hand, config()))


def sharded(base: nn.Module) -> nn.Module:
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(base, mesh=mesh)


attempt("FSDP2", lambda: get_peft_model(sharded(small()), config()))
(folder / f"found-{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
