"""`Trainer` with `torch_compile`: the same steps as without, as one graph."""

import pytest
import tiny
import torch
import transformers as tr
from plain import N, table_of

from prefix_adapter import PrefixTuningV2Config, get_peft_model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_same_steps(tmp_path):
    def train(backend):
        base = tiny.model("llama", "AutoModelForCausalLM", num_hidden_layers=2)
        torch.manual_seed(0)
        model = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=N, prefix_dropout=0.0, init_std=0.5))
        arguments = tr.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
            use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=5,
            torch_compile_backend=backend,
        )  # fmt: skip
        assert arguments.torch_compile == (backend is not None)
        trainer = tr.Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in tiny.ids(16)])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, table_of(model).detach().clone()

    losses, table = train(None)
    torch._dynamo.utils.counters.clear()
    compiled_losses, compiled_table = train("aot_eager")
    assert len(losses) == 3 and compiled_losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(compiled_table, table, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
