"""Train the adapter with transformers' own `Trainer`.

    pip install "prefix-adapter[train]"
    python examples/hf_trainer.py --train train.jsonl --validation dev.jsonl --model bert-base-cased

A row is `{"text": ..., "label": ...}`. This script does not use `prefix_adapter.training`: `get_peft_model` adds the
prefix, and `Trainer` trains it. The checkpoints contain only the prefix and the head. Both need a learning rate
several hundred times that of full fine-tuning.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from prefix_adapter import PrefixTuningV2Config, get_peft_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", required=True, help="training rows")
parser.add_argument("--validation", required=True, help="rows for selecting the best epoch")
parser.add_argument("--model", default="bert-base-cased", help="the base model")
parser.add_argument("--output", default="runs/hf-trainer", help="folder for the adapter and checkpoints")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--max-rows", type=int, help="use only this many rows of each file, for a quick try")
args = parser.parse_args()

data = load_dataset("json", data_files={"train": args.train, "validation": args.validation})
if args.max_rows:
    data = {split: rows.shuffle(seed=0).select(range(args.max_rows)) for split, rows in data.items()}
labels = sorted({*data["train"]["label"], *data["validation"]["label"]})
tokenizer = AutoTokenizer.from_pretrained(args.model)


def encode(rows):
    encoded = tokenizer(rows["text"], truncation=True, max_length=128)
    return {**encoded, "labels": [labels.index(label) for label in rows["label"]]}


encoded = {split: rows.map(encode, batched=True, remove_columns=rows.column_names) for split, rows in data.items()}
base = AutoModelForSequenceClassification.from_pretrained(
    args.model, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
)
model = get_peft_model(base, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=20))
model.print_trainable_parameters()

trainer = Trainer(
    model,
    TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        label_names=["labels"],
    ),
    train_dataset=encoded["train"],
    eval_dataset=encoded["validation"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
)
trainer.train()
print(f"validation accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
model.save_pretrained(args.output)
