"""tensor_parallel_worker.py FOLDER MODEL:CASE ...: a model over all processes, and in one process alone.

The environment is that of torchrun, which `test_tensor_parallel.py` sets.
`found-RANK.json` in the folder has what came out, by MODEL:CASE. A case is one of CASES,
each of which trains an adapter, or one of those in `run`. With a model of HEADS_WHOLE each process computes all heads.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as tr
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

from prefix_adapter import (
    PeftModel,
    PrefixTuningV2Config,
    PTuningConfig,
    get_peft_model,
    init_from,
    init_from_text,
    use_strength,
)

torch.set_num_threads(1)
tr.utils.logging.disable_progress_bar()
tr.logging.set_verbosity_error()

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Sizes that 3 processes can divide.
THIRDS = {**SMALL, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GPT = {"vocab_size": 96, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SPECIAL = {name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}


def stack() -> Any:
    """An encoder or decoder."""
    return tr.T5GemmaModuleConfig(**SMALL, num_key_value_heads=4, head_dim=8, sliding_window=6)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tr.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama, 4 heads": lambda: tr.LlamaConfig(**SMALL, num_key_value_heads=4),
    "llama, 2 heads": lambda: tr.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama, 1 head": lambda: tr.LlamaConfig(**SMALL, num_key_value_heads=1),
    "llama, 3 heads": lambda: tr.LlamaConfig(**THIRDS, num_key_value_heads=3),
    "qwen3": lambda: tr.Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=8),
    "gemma3": lambda: tr.Gemma3TextConfig(**SMALL, num_key_value_heads=4, head_dim=8, sliding_window=64),
    "gpt_neox": lambda: tr.GPTNeoXConfig(**SMALL),
    "gptj": lambda: tr.GPTJConfig(**GPT, initializer_range=0.2),
    "codegen": lambda: tr.CodeGenConfig(**GPT, n_ctx=128, initializer_range=0.2),
    "olmo2": lambda: tr.Olmo2Config(**SMALL, num_key_value_heads=4),
    "phi3": lambda: tr.Phi3Config(**SMALL, num_key_value_heads=4),
    "mixtral": lambda: tr.MixtralConfig(**SMALL, **EXPERTS, num_key_value_heads=4),
    "gpt_oss": lambda: tr.GptOssConfig(**SMALL, **EXPERTS, num_key_value_heads=4, head_dim=8, sliding_window=64),
    "deepseek_v2": lambda: tr.DeepseekV2Config(**SMALL, **LATENT, num_key_value_heads=4),
    "cohere2": lambda: tr.Cohere2Config(**SMALL, num_key_value_heads=4, sliding_window=6),
    "t5gemma": lambda: tr.T5GemmaConfig(encoder=stack(), decoder=stack(), **SPECIAL, initializer_range=0.2),
}
HEADS_WHOLE = ("llama, 1 head", "llama, 2 heads")
# A rate at which an MLP falls far would magnify rounding.
CASES: dict[str, dict[str, Any]] = {
    "table": {},
    "table, AdamW": {"optimizer": "AdamW"},
    "MLP": {"optimizer": "AdamW", "rate": 0.005, "prefix_projection": True, "encoder_hidden_size": 16},
    "low rank": {"optimizer": "AdamW", "lora_r": 4},
    "text": {"text": [5, 6, 7, 8, 9]},
    "frozen": {"text": [5, 6, 7, 8, 9], "optimizer": "AdamW", "num_frozen_tokens": 2},
    "attention": {"entry_point": "attention", "optimizer": "AdamW"},
    "checkpointing": {
        "checkpointing": True,
        "rate": 0.02,
        "lora_r": 2,
        "prefix_projection": True,
        "encoder_hidden_size": 16,
    },
}
STEPS = 20

folder, jobs = Path(sys.argv[1]), sys.argv[2:]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def load(name: str, divided: bool) -> Any:
    plan: Any = "auto"
    if name in HEADS_WHOLE:
        styles = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
        styles["o_proj"] = "rowwise_split_input"
        plan = {f"model.layers.*.self_attn.{key}": style for key, style in styles.items()}
    options = {"distributed_config": DistributedConfig(tp_size=size, tp_plan=plan)} if divided else {}
    return auto_class(name).from_pretrained(folder / name, **options)


def auto_class(name: str) -> Any:
    return tr.AutoModelForSeq2SeqLM if CONFIGS[name]().is_encoder_decoder else tr.AutoModelForCausalLM


def config(**settings: Any) -> PrefixTuningV2Config:
    return PrefixTuningV2Config(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "init_std": 0.5, **settings})


def outputs(model: Any, **options: Any) -> dict[str, Any]:
    inputs = {**batch(), **options}
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, labels=labels).logits
    return {"logits": logits, "text": model.generate(**inputs, max_new_tokens=8, do_sample=False)}


def train(
    name: str,
    divided: bool,
    optimizer: str = "SGD",
    rate: float | None = None,
    text: Any = None,
    checkpointing: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """An adapter's losses, its outputs with and without a strength, its weights, and the folder where it is saved."""
    torch.manual_seed(7 + 100 * (rank if divided else 0))  # the processes draw other numbers
    task = "SEQ_2_SEQ_LM" if CONFIGS[name]().is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(load(name, divided), config(task_type=task, **settings))
    if text:
        init_from_text(model, text)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    torch.manual_seed(11)  # dropout must be the same
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    own = {"lr": rate or 0.5} if optimizer == "SGD" else {"lr": rate or 0.05, "eps": 1e-4}
    steps, losses = getattr(torch.optim, optimizer)(trained.values(), **own), []
    model.train()
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    model.eval()
    with use_strength(model, 0.5):
        half = outputs(model)
    weights = {key: parameter.detach().clone() for key, parameter in trained.items()}
    saved = folder / f"{name}-{'divided' if divided else 'whole'}"
    model.save_pretrained(saved, is_main_process=rank == 0)
    return {"losses": losses, **outputs(model), "half": half["logits"], "weights": weights}


def mixed(name: str, divided: bool) -> dict[str, Any]:
    """Each row with its own adapter and strength."""
    torch.manual_seed(3)
    model = get_peft_model(load(name, divided), config(lora_r=2), "a")
    model.add_adapter("b", config(num_virtual_tokens=3))
    model.add_adapter("c", config(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8))
    up = model.base_model.prefix_layer.encoder_of("a").up
    nn.init.normal_(up.weight, generator=torch.Generator().manual_seed(1))
    names = ["a", "b", "__base__", "c"]
    with use_strength(model.eval(), [0.5, 1.0, 1.0, 0.3]):
        return {"losses": [], **outputs(model, adapter_names=names), "weights": {}}


def virtual(name: str, divided: bool) -> dict[str, Any]:
    """P-Tuning with the paper's encoder, trained with three virtual tokens in the middle of each row."""
    torch.manual_seed(7 + 100 * (rank if divided else 0))
    model = get_peft_model(load(name, divided), PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = batch()
    inputs["input_ids"][:, 5:8] = torch.arange(96, 99)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    steps, losses = torch.optim.AdamW(trained.values(), lr=0.01, eps=1e-4), []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    found = outputs(model.eval(), input_ids=inputs["input_ids"])
    return {"losses": losses, **found, "weights": {key: each.detach().clone() for key, each in trained.items()}}


def words_divided_in_hooks(name: str) -> Any:
    """torch's own tensor parallelism for the word embeddings."""
    model = load(name, False)
    styles = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model.model, init_device_mesh("cpu", (size,)), {"embed_tokens": styles})
    return model


def by_hand(name: str, divided: bool) -> dict[str, Any]:
    """torch's own tensor parallelism, which transformers knows nothing of."""
    model, mesh = load(name, False), init_device_mesh("cpu", (size,))
    for layer in model.model.layers if divided else ():
        plan = {key: ColwiseParallel() for key in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(layer.self_attn, mesh, {**plan, "o_proj": RowwiseParallel()})
    torch.manual_seed(3)
    model = get_peft_model(model, config()).eval()
    model(**batch()).loss.backward()
    table = model.base_model.prefix_layer.encoder_of("default").embedding.weight
    return {"losses": [], **outputs(model), "weights": {"gradient": table.grad}}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far apart the results of all processes and of one are."""

    def gap(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).abs().max() / other.abs().max()).item()

    losses = zip(found["losses"], expected["losses"], strict=True)
    return {
        "losses": max((abs(one - other) for one, other in losses), default=0.0),
        "fall": expected["losses"][0] - expected["losses"][-1] if expected["losses"] else 1.0,
        "logits": max(gap(found[key], expected[key]) for key in ("logits", "half") if key in expected),
        "weights": max((gap(found["weights"][key], each) for key, each in expected["weights"].items()), default=0.0),
        "same text": torch.equal(found["text"], expected["text"]),
    }


def load_saved(name: str) -> dict[str, Any]:
    """Adapters that one process has saved, in all processes, and the other way round."""
    model = PeftModel.from_pretrained(load(name, True), str(folder / f"{name}-whole")).eval()
    divided = outputs(model)["logits"]
    fresh = get_peft_model(load(name, True), config()).eval()
    init_from(fresh, folder / f"{name}-whole")
    found = {"init_from": (outputs(fresh)["logits"] - divided).abs().max().item()}
    for kind in ("whole", "divided"):
        saved = folder / f"{name}-{kind}"
        logits = outputs(PeftModel.from_pretrained(load(name, False), str(saved)).eval())["logits"]
        found[kind] = (logits - divided).abs().max().item()
    configs = [(folder / f"{name}-{kind}" / "adapter_config.json").read_text() for kind in ("whole", "divided")]
    return {**found, "same config": configs[0] == configs[1]}


def attempt(wrap: Callable[[], Any]) -> str:
    try:
        wrap()
    except ValueError as error:
        return str(error)
    return "taken"


def sharded(name: str) -> Any:
    base, mesh = load(name, False), init_device_mesh("cpu", (size,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(base, mesh=mesh)


def staged(name: str) -> Any:
    """A model with some layers in each process."""
    return auto_class(name).from_pretrained(folder / name, distributed_config=DistributedConfig(pp_size=size))


def run(name: str, case: str) -> Any:
    if case == "refused":
        return attempt(lambda: get_peft_model(load(name, True), config()))
    if case == "low rank refused":
        return attempt(lambda: get_peft_model(load(name, True), config(lora_r=2)))
    if case == "FSDP2":
        return attempt(lambda: get_peft_model(sharded(name), config()))
    if case == "P-Tuning refused":
        return attempt(lambda: get_peft_model(words_divided_in_hooks(name), PTuningConfig(task_type="CAUSAL_LM")))
    if case == "FSDP2, P-Tuning":
        return attempt(lambda: get_peft_model(sharded(name), PTuningConfig(task_type="CAUSAL_LM")))
    if case == "pipeline":
        return attempt(lambda: get_peft_model(staged(name), config()))
    if case == "saved":
        return load_saved(name)
    do = {"mixed": mixed, "by hand": by_hand, "P-Tuning": virtual}.get(case)
    found, expected = (do(name, each) if do else train(name, each, **CASES[case]) for each in (True, False))
    weights: list[Any] = [None] * size
    dist.all_gather_object(weights, found["weights"])
    same = all(torch.equal(each[key], weights[0][key]) for each in weights for key in weights[0])
    return {**compare(found, expected), "same weights": same}


if rank == 0:
    for name in sorted({job.partition(":")[0] for job in jobs}):
        torch.manual_seed(0)
        auto_class(name).from_config(CONFIGS[name]()).save_pretrained(folder / name)
dist.barrier()
seen = {job: run(*job.split(":")) for job in jobs}
(folder / f"found-{rank}.json").write_text(json.dumps(seen))
dist.barrier()
dist.destroy_process_group()
