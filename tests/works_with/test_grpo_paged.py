"""TRL's GRPO with continuous batching: the adapter writes the completions, and the base model is the reference."""

import pytest
import tiny
import torch
import transformers as tr
from datasets import Dataset

from prefix_adapter import PrefixTuningV2Config

trl = pytest.importorskip("trl")
pytest.importorskip("transformers.generation.continuous_batching")

NEW = 6


@torch.no_grad()
def log_probs(model, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """The log probability of each token of a completion, in one forward without padding."""
    row = torch.cat([prompt, completion])
    scores = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, completion[:, None])[:, 0]


def test_completions_and_reference(tmp_path):
    folder = tiny.save(tmp_path / "base", "llama", [f"w{i}" for i in range(tiny.VOCAB - 6)], "AutoModelForCausalLM")
    tokenizer = tr.AutoTokenizer.from_pretrained(folder)
    base = tr.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ["w3 w4 w5", "w20 w21 w22 w23 w24 w25"]
    drawn, expected, kl = [], [], []

    def reward(prompts, completion_ids, **_):
        """Rewards in which completions of one prompt differ; notes what was drawn, and what should have been."""
        model = trainer.model
        for text, ids in zip(prompts, completion_ids, strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            start, completion = inputs["input_ids"][0], torch.tensor(ids)
            model.eval()
            answer = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, len(start) :]
            drawn.append(ids)
            expected.append(answer.tolist())
            if len(drawn) <= 4:
                difference = log_probs(base, start, completion) - log_probs(model, start, completion)
                kl.extend((difference.exp() - difference - 1).tolist())
            model.train()
        return [float(place) for place in range(len(prompts))]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, num_generations=2, max_completion_length=NEW, top_k=1, beta=0.5,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        tr.AutoModelForCausalLM.from_pretrained(folder),
        reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=PrefixTuningV2Config(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_dropout=0.0, init_std=0.5
        ),
    )
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()

    assert len(drawn) == 8 and drawn == expected
    plain = [
        base.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist()
        for text in prompts
    ]
    assert not any(ids in plain for ids in drawn)
    # The first step's divergence from the reference, before anything was trained.
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0] == pytest.approx(sum(kl) / len(kl), rel=1e-3) and logged[0] > 0.1 and logged[1] != logged[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
