"""TRL's trainers: one step on padded, packed and flattened batches is the plain backbone's step, row by row."""

import pytest
import tiny
import torch
from datasets import Dataset
from plain import N, decoder, log_probs, logits, step, table_of, text, tokenizer

from prefix_adapter import PrefixTuningV2Config, get_peft_model

trl = pytest.importorskip("trl", reason="needs the `works-with` extra")

RATE = 0.5
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[USER] ' + m.content + ' ' }}{% else %}{{ '[ASSISTANT] ' }}"
    "{% generation %}{{ m.content + ' [EOS] ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[ASSISTANT] ' }}{% endif %}"
)
ROWS = [text(length, seed) for seed, length in enumerate((5, 9, 3, 12))]


def config(**changes) -> PrefixTuningV2Config:
    return PrefixTuningV2Config(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_dropout=0.0, init_std=0.5, **changes
    )


def arguments(kind: str, folder, **changes):
    """One step of gradient descent in full precision. TRL's own defaults, such as gradient checkpointing, stay."""
    settings = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": RATE,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return getattr(trl, f"{kind}Config")(**settings, **changes)


def train(trainer) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The logged loss, and the table before and after."""
    before = table_of(trainer.model).detach().clone()
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, before, table_of(trainer.model).detach().clone()


def assert_same_step(trainer, loss_of) -> None:
    """`loss_of(table)` is the loss by the plain backbone; without a table it must differ."""
    loss, before, after = train(trainer)
    expected, moved = step(before, loss_of, RATE)
    assert (moved - before).abs().max() > 1e-3 and abs(expected - loss_of(None).item()) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(after, moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["padded", "packed", "padding-free", "assistant-only"])
def test_sft(how, tmp_path):
    words = tokenizer(CHAT)
    changes = {
        "packed": {"packing": True, "max_length": 32},
        "padding-free": {"padding_free": True, "max_length": None},
        "assistant-only": {"assistant_only_loss": True},
    }.get(how, {})
    turns = [(text(3, 10 + i), text(2 + i, 20 + i)) for i in range(4)]
    if how == "assistant-only":
        said = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
        rows = Dataset.from_dict({"messages": said})
        texts = [f"[USER] {question} [ASSISTANT] {answer} [EOS]" for question, answer in turns]
        skipped = [len(words(f"[USER] {question}")["input_ids"]) for question, _ in turns]
    else:
        rows, texts, skipped = Dataset.from_dict({"text": ROWS}), [f"{row} [EOS]" for row in ROWS], [0] * 4

    def loss_of(table):
        encoded = [words(each, return_tensors="pt").input_ids[0] for each in texts]
        found = [log_probs(base, row, table)[skip:] for row, skip in zip(encoded, skipped, strict=True)]
        return -torch.cat(found).mean()

    base = decoder()
    trainer = trl.SFTTrainer(
        decoder(),
        arguments("SFT", tmp_path, **changes),
        train_dataset=rows,
        processing_class=words,
        peft_config=config(),
    )
    batch = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert len(batch) == (1 if how in ("packed", "padding-free") else 4)
    assert_same_step(trainer, loss_of)


PAIRS = {
    "prompt": [text(4, 30 + i) for i in range(4)],
    "chosen": [" " + text(2 + i, 40 + i) for i in range(4)],
    "rejected": [" " + text(5 - i, 50 + i) for i in range(4)],
}


@pytest.mark.parametrize("start", ["new", "trained"])
def test_dpo(start, tmp_path):
    """The reference is the base model for a new adapter, and a copy of the adapter for a trained one."""
    base, words, beta = decoder(), tokenizer(), 0.3
    model, peft_config = decoder(), config()
    if start == "trained":
        model, peft_config = get_peft_model(model, peft_config), None
        tiny.randomize(model)
    trainer = trl.DPOTrainer(
        model,
        args=arguments("DPO", tmp_path, beta=beta),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=words,
        peft_config=peft_config,
    )
    first = table_of(trainer.model).detach().clone() if start == "trained" else None

    def score(table, prompt, answer):
        row = words(f"{prompt}{answer} [EOS]", return_tensors="pt").input_ids[0]
        return log_probs(base, row, table)[len(words(prompt)["input_ids"]) - 1 :].sum()

    def loss_of(table):
        losses = []
        for prompt, chosen, rejected in zip(*PAIRS.values(), strict=True):
            won = score(table, prompt, chosen) - score(first, prompt, chosen).detach()
            lost = score(table, prompt, rejected) - score(first, prompt, rejected).detach()
            losses.append(-torch.nn.functional.logsigmoid(beta * (won - lost)))
        return torch.stack(losses).mean()

    assert_same_step(trainer, loss_of)


def test_reward(tmp_path):
    words = tokenizer()
    base = tiny.model("llama", "AutoModelForSequenceClassification", num_labels=1, pad_token_id=0)
    rows = {
        name: [f"{a}{b}" for a, b in zip(PAIRS["prompt"], PAIRS[name], strict=True)] for name in ("chosen", "rejected")
    }
    model = tiny.model("llama", "AutoModelForSequenceClassification", num_labels=1, pad_token_id=0)
    trainer = trl.RewardTrainer(
        model,
        args=arguments("Reward", tmp_path),
        train_dataset=Dataset.from_dict(rows),
        processing_class=words,
        peft_config=PrefixTuningV2Config(
            task_type="SEQ_CLS", num_virtual_tokens=N, prefix_dropout=0.0, init_std=0.5, modules_to_save=["score"]
        ),
    )

    def loss_of(table):
        def score(each):
            return logits(base, words(f"{each} [EOS]", return_tensors="pt").input_ids[0], table)

        pairs = zip(rows["chosen"], rows["rejected"], strict=True)
        return torch.stack([-torch.nn.functional.logsigmoid(score(a) - score(b)).squeeze() for a, b in pairs]).mean()

    assert_same_step(trainer, loss_of)


def test_grpo(tmp_path):
    """Completions are drawn from the model with its prefix, and the step is that of the policy gradient on them."""
    base, words, drawn = decoder(), tokenizer(), []

    def reward(prompts, completions, completion_ids, **_):
        drawn.extend((p, torch.tensor(ids)) for p, ids in zip(prompts, completion_ids, strict=True))
        return [float(ids[0] + len(ids)) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        decoder(),
        reward,
        args=arguments(
            "GRPO",
            tmp_path,
            num_generations=2,
            max_completion_length=5,
            top_k=4,
            loss_type="grpo",
            beta=0.0,
            scale_rewards="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": [text(3 + i, 60 + i) for i in range(2)]}),
        processing_class=words,
        peft_config=config(),
    )

    def loss_of(table):
        rewards = torch.tensor([float(ids[0] + len(ids)) for _, ids in drawn]).view(-1, 2)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        losses = []
        for (prompt, ids), advantage in zip(drawn, advantages, strict=True):
            start = words(prompt, return_tensors="pt").input_ids[0]
            found = log_probs(base, torch.cat([start, ids]), table)[len(start) - 1 :]
            losses.append(-advantage * (found - found.detach()).exp().mean())
        return torch.stack(losses).mean()

    _, before, after = train(trainer)
    assert len(drawn) == 4
    _, moved = step(before, loss_of, RATE)
    assert (moved - before).abs().max() > 1e-3
    torch.testing.assert_close(after, moved, rtol=1e-3, atol=1e-5)
    ranks = {"with": [], "without": []}
    for prompt, ids in drawn:
        start = words(prompt, return_tensors="pt").input_ids[0]
        for name, table in (("with", before), ("without", None)):
            found = logits(base, torch.cat([start, ids]), table)[len(start) - 1 : -1]
            ranks[name] += [(row > row[token]).sum().item() for row, token in zip(found, ids, strict=True)]
    assert max(ranks["with"]) < 4 <= max(ranks["without"])
