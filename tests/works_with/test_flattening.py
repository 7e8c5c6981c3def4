"""`DataCollatorWithFlattening`: a batch in one row gives each sequence what it gives alone."""

import pytest
import tiny
import torch
import transformers as tr
from plain import N, decoder, log_probs, logits, step, table_of

from prefix_adapter import PrefixTuningV2Config, get_peft_model

ROWS = [tiny.ids(1, length, seed=length)[0] for length in (5, 9, 3)]


def wrapped(attn):
    base = tiny.model("llama", "AutoModelForCausalLM", attn=attn)
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_dropout=0.0)
    model = get_peft_model(base, config)
    tiny.randomize(model)
    return model


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_each_sequence_is_as_if_alone(attn):
    base, model = decoder(), wrapped(attn).eval()
    batch = tr.DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in ROWS])
    assert batch["input_ids"].shape == (1, 17)
    # With `use_cache`, transformers does not see that the positions start anew, with and without an adapter.
    parts = model(**batch, use_cache=False).logits[0].split([len(row) for row in ROWS])
    for part, row in zip(parts, ROWS, strict=True):
        torch.testing.assert_close(part, logits(base, row, table_of(model)), rtol=1e-4, atol=1e-4)
        assert (part - logits(base, row, None)).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_trainer(checkpointing, tmp_path):
    base, model = decoder(), wrapped("sdpa")
    before = table_of(model).detach().clone()
    arguments = tr.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, learning_rate=0.5, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", gradient_checkpointing=checkpointing, use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = tr.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row.tolist()} for row in ROWS],
        data_collator=tr.DataCollatorWithFlattening(),
    )
    trainer.train()
    expected, moved = step(before, lambda table: -torch.cat([log_probs(base, row, table) for row in ROWS]).mean(), 0.5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert (moved - before).abs().max() > 1e-3
    torch.testing.assert_close(table_of(model).detach(), moved, rtol=1e-3, atol=1e-5)
