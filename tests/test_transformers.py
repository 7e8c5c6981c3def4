"""Stock transformers after `import prefix_adapter`: native adapters, pipelines, Trainer, torch.compile, caches."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tr
from packaging import version
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from prefix_adapter import PrefixTuningV2Config

# What a tiny model of a kind is here: its auto class, its PEFT task, and the head trained beside the prefix.
TASKS = {
    "bert": ("AutoModelForSequenceClassification", "SEQ_CLS", ["classifier"]),
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM", None),
}
KINDS = tuple(TASKS)
ENCODERS = {"table": {}, "mlp": {"prefix_projection": True, "encoder_hidden_size": 12}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = "adapter_model.safetensors"

# PEFT, not we, says this of every second adapter, and asks transformers for a deprecated name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # transformers 5.0, which we support, knows this under no other name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted"),
]


def adapter(kind, encoder="table", **changes):
    _, task, head = TASKS[kind]
    fields = {"num_virtual_tokens": 5, "task_type": task, "modules_to_save": head, **ENCODERS[encoder], **changes}
    return PrefixTuningV2Config(**fields)


def base_model(kind, **changes):
    return tiny.model(kind, TASKS[kind][0], **changes)


def wrapped_model(kind, encoder="table", seed=2, **changes):
    """A model in eval mode whose prefix and head have an effect."""
    model = get_peft_model(base_model(kind), adapter(kind, encoder, **changes))
    tiny.randomize(model, seed=seed)
    return model.eval()


@torch.no_grad()
def logits(model, input_ids=None, **kwargs):
    return model(input_ids=tiny.ids() if input_ids is None else input_ids, **kwargs).logits


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def is_adapter(name):
    """Whether a parameter is the prefix's or the trained head's."""
    return "prefix_tuning_v2_" in name or "modules_to_save" in name


def assert_same_tensors(some, others):
    assert some and some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


def layer_changes(before, after, container):
    """For each of the three layers, and for its keys and its values, how far training moved the prefix."""
    name = next(name for name in before if f"_{container}." in name and name.endswith("weight"))
    difference = (after[name] - before[name]).abs()
    # A table's columns, or the rows of an MLP's last matrix.
    return difference.movedim(0 if container == "output" else 1, 0).reshape(2 * tiny.LAYERS, -1).amax(dim=1)


def needs_heads_in_transformers():
    """transformers' own loader, with any PEFT method, reads the heads of `modules_to_save` from 5.18 on."""
    if version.parse(tr.__version__) < version.parse("5.18"):
        pytest.skip("transformers' own load_adapter reads no task heads before 5.18")


# ---- transformers' own add_adapter, load_adapter, ...


@pytest.fixture(params=[(kind, encoder) for kind in KINDS for encoder in ENCODERS], ids="-".join)
def saved(request, tmp_path, native_adapters):
    """Two adapters "a" and "b" that PEFT trained and saved, their base model, and what they answer."""
    kind, encoder = request.param
    if kind == "bert":
        needs_heads_in_transformers()
    auto_class = getattr(tr, TASKS[kind][0])
    base = tmp_path / "base"
    base_model(kind).save_pretrained(base)
    answers = {"base": logits(base_model(kind))}
    for seed, name in enumerate("ab", start=2):
        model = get_peft_model(auto_class.from_pretrained(base), adapter(kind, encoder)).eval()
        tiny.randomize(model, seed=seed)
        answers[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    assert (answers["a"] - answers["base"]).abs().max() > 0.1
    assert (answers["a"] - answers["b"]).abs().max() > 0.1
    return SimpleNamespace(
        kind=kind,
        config=lambda: adapter(kind, encoder),
        folder=tmp_path,
        answers=answers,
        auto_class=auto_class,
        load=lambda: auto_class.from_pretrained(base).eval(),
        load_peft=lambda folder: PeftModel.from_pretrained(auto_class.from_pretrained(base), folder).eval(),
    )


def test_native_load_adapter(saved):
    model = saved.load()
    info = model.load_adapter(str(saved.folder / "a"))
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(logits(model), saved.answers["a"])
    # transformers leaves saved heads trainable, whatever the PEFT method.
    assert all("modules_to_save" in name for name in trainable(model))


def test_native_load_adapter_to_train_it_on(saved):
    model = saved.load()
    model.load_adapter(str(saved.folder / "a"), is_trainable=True)
    assert torch.equal(logits(model.eval()), saved.answers["a"])
    assert trainable(model) and all(map(is_adapter, trainable(model)))


def test_auto_model_from_adapter_folder(saved):
    model = saved.auto_class.from_pretrained(saved.folder / "a")
    assert isinstance(model, tr.PreTrainedModel)
    assert torch.equal(logits(model), saved.answers["a"])


def test_native_disable_and_enable(saved):
    model = saved.load()
    model.load_adapter(str(saved.folder / "a"))
    model.disable_adapters()
    assert torch.equal(logits(model), saved.answers["base"])
    model.enable_adapters()
    for module in model.modules():
        # transformers disables saved heads and forgets to enable them, whatever the PEFT method.
        if isinstance(module, ModulesToSaveWrapper):
            module.enable_adapters(True)
    assert torch.equal(logits(model), saved.answers["a"])


def test_native_set_and_delete_adapter(saved):
    model = saved.load()
    for name in "ab":
        model.load_adapter(str(saved.folder / name), name)
    for name in "bab":
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), saved.answers[name])
    model.delete_adapter("b")
    assert not any(".b." in name for name in model.state_dict())
    model.set_adapter("a")
    assert torch.equal(logits(model), saved.answers["a"])
    model.delete_adapter("a")
    assert not any("prefix_tuning_v2_" in name for name in model.state_dict())
    assert torch.equal(logits(model), saved.answers["base"])


def test_native_adapters_side_by_side(native_adapters):
    first, second = wrapped_model("llama", seed=2), wrapped_model("llama", seed=3)
    states = {"a": first.state_dict(), "b": second.state_dict()}
    native, wrapped = base_model("llama"), get_peft_model(base_model("llama"), adapter("llama"), "a")
    native.add_adapter(adapter("llama"), "a")
    native.add_adapter(adapter("llama"), "b")
    wrapped.add_adapter("b", adapter("llama"))
    for name, state in states.items():
        renamed = {key.replace("default", name): value for key, value in state.items() if "prefix" in key}
        wrapped.load_state_dict(renamed, strict=False)
        native.load_state_dict({k.removeprefix("base_model.model."): v for k, v in renamed.items()}, strict=False)
    native.set_adapter(["a", "b"])
    wrapped.base_model.set_adapter(["a", "b"])
    both = logits(native.eval())
    assert torch.equal(both, logits(wrapped.eval()))
    assert not torch.allclose(both, logits(first)) and not torch.allclose(both, logits(second))


def test_native_save_is_what_peft_saves(saved):
    model = saved.load()
    model.load_adapter(str(saved.folder / "a"))
    model.save_pretrained(saved.folder / "native")
    # generation_config.json is written for every model that generates, whatever the PEFT method.
    assert {path.name for path in (saved.folder / "native").iterdir()} - {"generation_config.json"} == ADAPTER_FILES
    peft_weights, weights = load_file(saved.folder / "a" / WEIGHTS), load_file(saved.folder / "native" / WEIGHTS)
    assert_same_tensors(weights, peft_weights)
    state = {f"base_model.model.{name}": value for name, value in model.get_adapter_state_dict().items()}
    assert_same_tensors(state, peft_weights)
    configs = [json.loads((saved.folder / name / "adapter_config.json").read_text()) for name in ("a", "native")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(saved.load_peft(saved.folder / "native")), saved.answers["a"])


def test_native_training(saved):
    model = saved.load()
    model.add_adapter(saved.config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(map(is_adapter, trainable(model))), "the base model is not frozen"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = torch.tensor([0, 2]) if saved.kind == "bert" else tiny.ids()
    losses = []
    for _ in range(8):
        model.train()
        loss = model(tiny.ids(), labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable(model))
    model.save_pretrained(saved.folder / "trained")
    trained = logits(model.eval())
    assert (trained - saved.answers["base"]).abs().max() > 0.1
    assert torch.equal(logits(saved.load_peft(saved.folder / "trained")), trained)
    assert torch.equal(logits(saved.auto_class.from_pretrained(saved.folder / "trained")), trained)


def test_training_step_warns_of_nothing():
    model = get_peft_model(base_model("bert"), adapter("bert")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tiny.ids(), labels=torch.tensor([0, 2])).loss.backward()


# ---- Pipelines


@pytest.fixture
def tokenizer():
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3}
    vocabulary.update({f"w{i}": i for i in range(len(vocabulary), tiny.VOCAB)})
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    lengths = (3, 7, 5)
    return [" ".join(f"w{i}" for i in tiny.ids(1, n, seed=n)[0].tolist()) for n in lengths]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_classification_pipeline(tokenizer, texts, batch_size):
    model = wrapped_model("bert")
    pipe = tr.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = pipe(texts, top_k=None, batch_size=batch_size)
    scores = [[score["score"] for score in sorted(row, key=lambda score: score["label"])] for row in found]

    def by_hand():
        rows = [logits(model, **tokenizer(text, return_tensors="pt")) for text in texts]
        return torch.cat(rows).softmax(dim=-1)

    torch.testing.assert_close(torch.tensor(scores), by_hand())
    with model.disable_adapter():
        assert (torch.tensor(scores) - by_hand()).abs().max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation_pipeline(tokenizer, texts, batch_size):
    model = wrapped_model("llama")
    tokenizer.padding_side = "left"
    pipe = tr.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    found = [row[0]["generated_text"] for row in pipe(texts, batch_size=batch_size, return_full_text=False, **options)]

    def by_hand():
        encoded = [tokenizer(text, return_tensors="pt") for text in texts]
        rows = [model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :] for inputs in encoded]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    assert found == by_hand() and all(found)
    with model.disable_adapter():
        assert found != by_hand()


# ---- Trainer


def examples(kind, count=32, length=8):
    """Sequences of which the first token says the class, or of which a token says the next."""
    rows = tiny.ids(count, length)
    if kind == "bert":
        labels = torch.arange(count) % 3
        rows[:, 0] = 5 + labels
    else:
        rows = 5 + (rows[:, :1] + torch.arange(length)) % 7
        labels = rows
    return [
        {"input_ids": r, "attention_mask": torch.ones_like(r), "labels": x} for r, x in zip(rows, labels, strict=True)
    ]


def trainer_for(model, folder, kind="bert", steps=6, callbacks=(), compute_metrics=None, **arguments):
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 0.05, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 5,
    }  # fmt: skip
    return tr.Trainer(
        model,
        tr.TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=examples(kind),
        eval_dataset=examples(kind, count=8),
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def new_wrapped(kind, encoder="table", seed=0, prefix_dropout=0.1, **model_changes):
    model = base_model(kind, **model_changes)
    torch.manual_seed(seed)
    return get_peft_model(model, adapter(kind, encoder, prefix_dropout=prefix_dropout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_trainer_learns(kind, encoder, tmp_path):
    # Without a task, PEFT trains no head beside the prefix: what is learned, the prefix learns.
    model = get_peft_model(base_model(kind), adapter(kind, encoder, task_type=None, modules_to_save=None))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "prefix" not in name}
    trainer = trainer_for(model, tmp_path, kind, steps=40, learning_rate=0.1)
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert_same_tensors(frozen, {name: p.detach() for name, p in model.named_parameters() if name in frozen})


@pytest.mark.parametrize("encoder", ENCODERS)
def test_trainer_checkpoint_holds_the_adapter_alone(encoder, tmp_path):
    model = new_wrapped("bert", encoder)
    trainer_for(model, tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    trainers_own = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert {path.name for path in checkpoint.iterdir()} == ADAPTER_FILES | trainers_own
    weights = load_file(checkpoint / WEIGHTS)
    assert all("prefix_tuning_v2_" in name or ".classifier." in name for name in weights)
    assert_same_tensors({name.replace(".default", "").replace("modules_to_save.", ""): value
                         for name, value in trainable(model).items()}, weights)  # fmt: skip
    values = sum(p.numel() for p in trainable(model).values())
    assert values < sum(p.numel() for p in base_model("bert").parameters()) / 2
    assert (checkpoint / WEIGHTS).stat().st_size < 4 * values + 2000
    # Adam keeps two values for every one that it trains, and there is nothing of the backbone among them.
    assert (checkpoint / "optimizer.pt").stat().st_size < 8 * values + 10000
    reloaded = PeftModel.from_pretrained(base_model("bert"), checkpoint)
    assert torch.equal(logits(reloaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_trainer_load_best_model_at_end(encoder, tmp_path):
    scores = iter([0.1, 0.9, 0.2])
    trainer = trainer_for(
        new_wrapped("bert", encoder), tmp_path, steps=6, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="score",
        compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    trainer.save_model(tmp_path / "end")
    ended = load_file(tmp_path / "end" / WEIGHTS)
    assert_same_tensors(ended, load_file(tmp_path / "checkpoint-4" / WEIGHTS))
    last = load_file(tmp_path / "checkpoint-6" / WEIGHTS)
    assert all(not torch.equal(ended[name], last[name]) for name in ended)
    best = PeftModel.from_pretrained(base_model("bert"), tmp_path / "checkpoint-4").eval()
    assert torch.equal(logits(trainer.model.eval()), logits(best))


class StopAt(tr.TrainerCallback):
    """Ends training in the middle, as a crash does that comes right after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_trainer_resume_is_exact(kind, encoder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(new_wrapped(kind, encoder), tmp_path / "whole", kind, **saving)
    whole.train()
    half = trainer_for(new_wrapped(kind, encoder), tmp_path / "half", kind, callbacks=[StopAt(3)], **saving)
    half.train()
    assert half.state.global_step == 3
    # A new process draws another prefix than the one that was saved.
    model = new_wrapped(kind, encoder, seed=99)
    started = trainable(model)
    resumed = trainer_for(model, tmp_path / "half", kind, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    ended = trainable(model)
    assert_same_tensors(ended, trainable(whole.model))
    assert all(not torch.equal(ended[name], started[name]) for name in ended)
    assert not torch.equal(logits(model.eval()), logits(half.model.eval()))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder, container", [("table", "embedding"), ("mlp", "output")])
def test_trainer_gradient_checkpointing(kind, encoder, container, use_reentrant, tmp_path):
    def train(**arguments):
        model = new_wrapped(kind, encoder, prefix_dropout=0.0, **(NO_DROPOUT if kind == "bert" else {}))
        before = trainable(model)
        trainer_for(model, tmp_path, kind, steps=3, **arguments).train()
        return model, before

    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    model, before = train(gradient_checkpointing=True, **checkpointing)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    changes = layer_changes(before, trainable(model), container)
    assert (changes > 1e-3).all(), changes
    plain, _ = train()
    if encoder == "mlp" and use_reentrant:
        # Each layer runs the MLP anew, and autograd adds up what comes of it in another order.
        torch.testing.assert_close(trainable(model), trainable(plain), rtol=1e-4, atol=1e-5)
    else:
        assert_same_tensors(trainable(model), trainable(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_bf16(kind, tmp_path):
    model = new_wrapped(kind, "mlp")
    before = trainable(model)
    trainer = trainer_for(model, tmp_path, kind, steps=30, learning_rate=0.03, bf16=True)
    trainer.train()
    losses, after = losses_of(trainer), trainable(model)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after.values())
    assert (layer_changes(before, after, "output") > 1e-3).all()


# ---- torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, encoder", [("bert", "table"), pytest.param("llama", "mlp", marks=pytest.mark.slow)])
def test_compile(kind, encoder, dynamo):
    model = wrapped_model(kind, encoder)
    expected, plain = logits(model), logits(base_model(kind))
    # As one graph: a break is an error. The eager backends change no arithmetic.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)
    assert (expected - plain).abs().max() > 0.1
    # The prefix is no constant of the graph: neither its values, nor whether it acts.
    tiny.randomize(model, seed=3)
    assert torch.equal(logits(compiled), logits(model))
    assert not torch.equal(logits(compiled), expected)
    with model.disable_adapter():
        assert torch.equal(logits(compiled), plain)


def test_compile_backward(dynamo):
    model = wrapped_model("bert", "mlp")
    labels = torch.tensor([0, 2])

    def gradients(forward):
        model.zero_grad()
        forward(tiny.ids(), labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(value.abs().max() > 0 for value in expected.values())
    torch.testing.assert_close(found, expected)


# ---- Caches


def test_chat_with_users_own_cache():
    model, rows = wrapped_model("llama"), tiny.ids(2, 12)
    cache = tr.DynamicCache(config=model.config)
    turns = [logits(model, turn, past_key_values=cache) for turn in (rows[:, :7], rows[:, 7:])]
    whole = logits(model, rows)
    torch.testing.assert_close(torch.cat(turns, dim=1), whole)
    assert cache.get_seq_length() == 12
    with model.disable_adapter():
        assert (whole - logits(model, rows)).abs().max() > 0.1


def test_generate_in_turns_with_users_own_cache():
    model, cache = wrapped_model("llama"), tr.DynamicCache()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    dialogue = tiny.ids(1, 6)
    for seed in (3, 4):
        in_one = model.generate(dialogue, **options)
        dialogue = model.generate(dialogue, past_key_values=cache, **options)
        assert torch.equal(dialogue, in_one)
        assert cache.get_seq_length() == dialogue.shape[1] - 1
        dialogue = torch.cat([dialogue, tiny.ids(1, 4, seed)], dim=1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}],
    ids=["static", "no-cache", "beams", "beams-no-cache"],
)
def test_generation_is_the_same_with_any_cache(options, padded):
    model, rows = wrapped_model("llama"), tiny.ids(2, 7)
    mask = torch.ones_like(rows)
    if padded:
        rows[0, :3], mask[0, :3] = 0, 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    common |= {"return_dict_in_generate": True, "output_scores": True}
    reference = {**common, "num_beams": options.get("num_beams", 1)}
    found, expected = model.generate(rows, **common, **options), model.generate(rows, **reference)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        plain = model.generate(rows, **reference)
    assert not torch.equal(found.sequences, plain.sequences)
