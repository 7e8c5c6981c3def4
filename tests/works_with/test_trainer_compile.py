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


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_same_steps(kind, tmp_path):
    losses, tables, graphs = [], [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        auto_class = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}[kind]
        changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
        base = tiny.model(kind, auto_class, **changes)
        torch.manual_seed(0)
        config = PrefixTuningV2Config(num_virtual_tokens=N, prefix_dropout=0.0, init_std=0.5)
        model = get_peft_model(base, config)
        rows = tiny.ids(16)
        labels = torch.arange(16) % 3 if kind == "bert" else rows
        arguments = tr.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
            use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, seed=5, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
        trainer = tr.Trainer(model, arguments, train_dataset=examples)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        tables.append(table_of(model).detach().clone())
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
