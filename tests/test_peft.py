"""Stock PEFT, unpatched, works with a prefix: training, several adapters, unloading, copies, checkpointing."""

import copy
import io

import peft
import peft.helpers
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config

N = 4
PREFIX = "prefix_tuning_v2_"
# Sizes of a prefix for one attention layer of the tiny models: keys and values.
COLUMNS = {"bert": 2 * 32, "gpt2": 2 * 32, "llama": 2 * 16, "t5": 2 * 32}
# T5 does not scale its scores: with the tiny model's weights its softmax is saturated, and gradients vanish.
CALM = {"t5": {"initializer_factor": 1.0}}
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "t5": {"dropout_rate": 0.0, **CALM["t5"]},
}
MODELS = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}
# Of a second adapter that shares as little as possible with a first.
OTHER = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, "layers_to_transform": [0, 2]}

# What: backbone, auto class, PEFT's task type, `modules_to_save`, the modules that are trained besides the prefix.
TASKS = {
    "sequence classification": ("bert", "ForSequenceClassification", "SEQ_CLS", None, {"classifier"}),
    "token classification": ("bert", "ForTokenClassification", "TOKEN_CLS", None, {"classifier"}),
    "question answering": ("bert", "ForQuestionAnswering", "QUESTION_ANS", None, {"qa_outputs"}),
    "causal lm": ("llama", "ForCausalLM", "CAUSAL_LM", None, set()),
    "causal lm gpt2": ("gpt2", "ForCausalLM", "CAUSAL_LM", None, set()),
    "seq2seq t5": ("t5", "ForSeq2SeqLM", "SEQ_2_SEQ_LM", None, set()),
    "seq2seq bart": ("bart", "ForSeq2SeqLM", "SEQ_2_SEQ_LM", None, set()),
    "feature extraction": ("bert", "", "FEATURE_EXTRACTION", None, set()),
    "multiple choice": ("bert", "ForMultipleChoice", None, ["classifier"], {"classifier"}),
    "masked lm": ("bert", "ForMaskedLM", None, None, set()),
    "no task type": ("bert", "ForSequenceClassification", None, ["classifier"], {"classifier"}),
}
LABELS = {
    "ForSequenceClassification": lambda ids: {"labels": torch.tensor([0, 2])},
    "ForTokenClassification": lambda ids: {"labels": ids % 3},
    "ForQuestionAnswering": lambda ids: {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 2]),
    },
    "ForMultipleChoice": lambda ids: {"labels": torch.tensor([0, 1])},
}


def config(**settings) -> PrefixTuningV2Config:
    return PrefixTuningV2Config(**{"num_virtual_tokens": N, "prefix_dropout": 0.0, **settings})


def draw(model, name: str, seed: int = 2, std: float = 0.5) -> None:
    """Draw all parameters of an adapter anew, active or not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def wrap(kind: str, auto_class: str = "AutoModel", name: str = "default", changes=None, **settings) -> PeftModel:
    """A tiny model in eval mode with an adapter that has an effect that cannot be overlooked."""
    model = get_peft_model(tiny.model(kind, auto_class, **(changes or {})), config(**settings), adapter_name=name)
    draw(model, name)
    return model.eval()


def batch(task: str) -> dict:
    """Inputs of two rows with labels for a task."""
    auto_class = TASKS[task][1]
    ids = tiny.ids(6).view(2, 3, 7) if auto_class == "ForMultipleChoice" else tiny.ids(2)
    mask = torch.ones_like(ids)
    mask[1, ..., -2:] = 0
    labels = {} if auto_class == "" else LABELS.get(auto_class, lambda ids: {"labels": ids})(ids)
    return {"input_ids": ids, "attention_mask": mask, **labels}


def loss_of(output) -> torch.Tensor:
    """The model's loss; where it has none, the distance of its features to random ones."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    states = output.last_hidden_state
    return F.mse_loss(states, torch.randn(states.shape, generator=torch.Generator().manual_seed(5)))


def of_task(task: str, **settings) -> PeftModel:
    kind, auto_class, task_type, modules_to_save, _ = TASKS[task]
    settings = {"task_type": task_type, "modules_to_save": modules_to_save, **settings}
    changes = {**CALM.get(kind, {}), **({"num_labels": 2} if task_type == "QUESTION_ANS" else {})}
    return get_peft_model(tiny.model(kind, f"AutoModel{auto_class}", **changes), config(**settings))


def ask(model, kind: str, **kwargs) -> torch.Tensor:
    """First outputs of a model for two rows."""
    inputs = {"input_ids": tiny.ids(2), **kwargs}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = tiny.ids(2, 5, seed=3)
    output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def answers(model, kind: str, **kwargs) -> torch.Tensor:
    return ask(model, kind, **kwargs)


def base_of(model, kind: str) -> torch.Tensor:
    with model.disable_adapter():
        return answers(model, kind)


def differ(left: torch.Tensor, right: torch.Tensor, by: float = 1e-3) -> bool:
    return (left - right).abs().max().item() > by


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- Training


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_training_changes_exactly_prefix_and_head(task, projection):
    model, inputs = of_task(task, prefix_projection=projection, prefix_dropout=0.1), batch(task)
    head = {f".{name}.modules_to_save.default." for name in TASKS[task][4]}
    expected = {name for name, _ in model.named_parameters() if PREFIX in name or any(part in name for part in head)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    before, buffers = parameters_of(model), {name: buffer.clone() for name, buffer in model.named_buffers()}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    first = loss_of(model.eval()(**inputs)).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model.train()(**inputs)).backward()
        optimizer.step()
    assert loss_of(model.eval()(**inputs)).item() < first

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # The bias of a multiple-choice head is the same for all choices, so nothing but rounding moves it.
    idle = {name for name in expected if task == "multiple choice" and name.endswith("default.bias")}
    assert expected - idle <= changed <= expected
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_element_of_the_prefix_gets_a_gradient(task, projection):
    model = of_task(task, prefix_projection=projection)
    draw(model, "default", std=0.1)
    loss_of(model.train()(**batch(task))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if PREFIX in name}
    assert len(gradients) == (5 if projection else 1)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        assert (gradient == 0).sum() == 0, f"{name}: {(gradient == 0).sum()} of {gradient.numel()} elements are dead"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "kind, settings, count",
    [
        ("bert", {"task_type": "SEQ_CLS"}, N * 3 * 64 + 32 * 3 + 3),
        ("bert", {"layers_to_transform": [1], "task_type": "SEQ_CLS"}, N * 64 + 32 * 3 + 3),
        ("llama", {}, N * 3 * 32),
        ("t5", {}, N * 9 * 64),
        ("t5", {"target_attention": ["cross"]}, N * 3 * 64),
        ("gpt2", {"prefix_projection": True, "encoder_hidden_size": 8}, N * 32 + 33 * 8 + 9 * 3 * 64),
    ],
)
def test_print_trainable_parameters(kind, settings, count, capsys):
    model = get_peft_model(tiny.model(kind, MODELS[kind]), config(**settings))
    total = sum(parameter.numel() for parameter in model.parameters())
    capsys.readouterr()
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {total:,} ||" in capsys.readouterr().out


def test_init_std_and_seed():
    def table(seed, **settings):
        base = tiny.model("bert")
        torch.manual_seed(seed)
        model = get_peft_model(base, config(num_virtual_tokens=100, **settings))
        return {name: p.detach() for name, p in model.named_parameters() if PREFIX in name}

    (default,) = table(1).values()
    assert default.std().item() == pytest.approx(0.02, rel=0.03) and abs(default.mean().item()) < 5e-4
    (wide,) = table(1, init_std=0.5).values()
    assert wide.std().item() == pytest.approx(0.5, rel=0.03)
    for name, tensor in table(1, prefix_projection=True, encoder_hidden_size=64).items():
        expected = 0.0 if name.endswith("bias") else 0.02
        assert tensor.std().item() == pytest.approx(expected, rel=0.05), name
    assert torch.equal(default, *table(1).values())
    assert not torch.equal(default, *table(2).values())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_prefix_dropout(kind, projection):
    settings = {"prefix_dropout": 0.5, "prefix_projection": projection, "changes": NO_DROPOUT[kind]}
    model = wrap(kind, MODELS[kind], **settings)
    same = {"input_ids": tiny.ids(1).expand(2, -1)}
    if kind == "t5":
        # `ask` gives the decoder two different rows.
        same["decoder_input_ids"] = tiny.ids(1, 5).expand(2, -1)

    def logits():
        with torch.no_grad():
            return model(**same).logits

    evaluated = logits()
    assert torch.equal(evaluated, logits()) and torch.allclose(evaluated[0], evaluated[1], atol=1e-5)
    model.train()
    first, second = logits(), logits()
    assert differ(first, second)
    assert differ(first[0], first[1]), "rows of one batch share a mask"
    assert differ(first, evaluated)
    torch.manual_seed(3)
    first = logits()
    torch.manual_seed(3)
    assert torch.equal(first, logits())

    still = wrap(kind, MODELS[kind], **{**settings, "prefix_dropout": 0.0}).train()
    assert torch.equal(answers(still, kind), answers(still, kind))
    assert torch.equal(answers(still, kind), answers(still.eval(), kind))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("kind", "dropout"), [("bert", 0.1), ("t5", 0.1), ("gpt2", 0.0), ("llama", 0.0)])
def test_a_decoder_has_no_dropout_by_default(tmp_path, kind, dropout, projection):
    settings = {"num_virtual_tokens": N, "prefix_projection": projection}
    one_for_all = PrefixTuningV2Config(**settings)
    get_peft_model(tiny.model("bert"), one_for_all)  # a config of several models keeps no value of the first
    model = get_peft_model(tiny.model(kind, MODELS[kind], **NO_DROPOUT[kind]), one_for_all)
    model.add_adapter("explicit", PrefixTuningV2Config(**settings, prefix_dropout=0.3))
    draw(model, "default")
    draw(model, "explicit")
    layer = model.base_model.prefix_layer

    def is_random():
        torch.manual_seed(0)
        return differ(answers(model, kind), answers(model, kind))

    model.train()
    assert (layer.dropout_of("default"), layer.dropout_of("explicit")) == (dropout, 0.3)
    assert is_random() == bool(dropout)
    model.set_adapter("explicit")
    assert is_random()
    model.eval()
    assert (layer.dropout_of("default"), layer.dropout_of("explicit")) == (0, 0)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny.model(kind, MODELS[kind], **NO_DROPOUT[kind]), tmp_path, is_trainable=True)
    assert loaded.train().base_model.prefix_layer.dropout_of("default") == dropout
    assert loaded.peft_config["default"].prefix_dropout is None


# ---- Several adapters


@pytest.mark.parametrize("kind", MODELS)
def test_second_adapter_leaves_the_first_alone(kind):
    model = wrap(kind, MODELS[kind], name="a", task_type="SEQ_CLS" if kind == "bert" else None)
    task = {"task_type": "SEQ_CLS" if kind == "bert" else None}
    first, base = answers(model, kind), base_of(model, kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert differ(first, base)

    model.add_adapter("b", config(**OTHER, **task))
    draw(model, "b", seed=4)
    assert model.active_adapters == ["a"]
    assert torch.equal(answers(model, kind), first)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained

    model.set_adapter("b")
    second = answers(model, kind)
    assert model.active_adapters == ["b"] and differ(second, first) and differ(second, base)
    trained_now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained_now and all(".b." in name for name in trained_now)
    lone = wrap(kind, MODELS[kind], name="b", **OTHER, **task)
    draw(lone, "b", seed=4)
    assert torch.equal(second, answers(lone, kind))

    loss = ask(model.train(), kind).square().mean()
    loss.backward()
    model.eval()
    assert all((parameter.grad is not None) == (name in trained_now) for name, parameter in model.named_parameters())
    model.set_adapter("a")
    assert torch.equal(answers(model, kind), first)
    assert torch.equal(base_of(model, kind), base)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("names", ["b", ["b"], ["a"]])
def test_switching_is_what_pefts_own_walk_through_the_model_does(names, inference_mode):
    """Heads at the end and inside of the backbone (the pooler) included."""
    found = []
    for switch in (type(wrap("bert").base_model).set_adapter, BaseTuner.set_adapter):
        model = wrap("bert", MODELS["bert"], name="a", modules_to_save=["classifier", "pooler"])
        model.add_adapter("b", config(**OTHER, modules_to_save=["classifier", "pooler"]))
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        switch(model.base_model, names, inference_mode)
        after = {name: p.requires_grad for name, p in model.named_parameters()}
        assert any(".pooler." in name for name in after) and (after != before or names == ["a"])
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        active = {name: m.active_adapters for name, m in model.named_modules() if isinstance(m, kinds)}
        found.append((after, active))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", MODELS)
def test_load_adapter_beside_another(kind, tmp_path):
    lone = wrap(kind, MODELS[kind], **OTHER)
    expected = answers(lone, kind)
    lone.save_pretrained(tmp_path)

    model = wrap(kind, MODELS[kind], name="a")
    draw(model, "a", seed=9)
    first = answers(model, kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not model.load_adapter(str(tmp_path), adapter_name="other").missing_keys
    assert torch.equal(answers(model, kind), first)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.set_adapter("other")
    assert torch.equal(answers(model, kind), expected) and differ(expected, first)

    model.load_adapter(str(tmp_path), adapter_name="c", is_trainable=True)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".c." in name)


def test_refused_second_adapter_leaves_no_trace():
    model = wrap("bert", name="a")
    first, names = answers(model, "bert"), set(model.state_dict())
    for settings, words in (
        ({"layers_to_transform": [7]}, "layers_to_transform"),
        ({"target_attention": ["cross"]}, "cross"),
    ):
        with pytest.raises(ValueError, match=words):
            model.add_adapter("b", config(**settings))
        assert list(model.peft_config) == ["a"] and set(model.state_dict()) == names
        assert torch.equal(answers(model, "bert"), first)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("a", config())
    model.add_adapter("b", config())
    assert torch.equal(answers(model, "bert"), first)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_refused_first_adapter_leaves_no_trace(kind):
    base = tiny.model(kind)
    before, expected = footprint(base), answers(base, kind)
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(base, config(layers_to_transform=[3]))
    assert footprint(base) == before
    assert torch.equal(answers(base, kind), expected)
    assert differ(answers(wrap(kind), kind), expected)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_delete_adapter(task_type):
    auto_class = MODELS["bert"] if task_type else "AutoModel"
    model = wrap("bert", auto_class, name="a", task_type=task_type)
    first, base = answers(model, "bert"), base_of(model, "bert")
    model.add_adapter("b", config(task_type=task_type, **OTHER))
    model.set_adapter("b")
    draw(model, "b", seed=4)
    assert differ(answers(model, "bert"), first)
    with pytest.warns(UserWarning, match="Setting active adapter to a"):
        model.delete_adapter("b")
    assert model.active_adapters == ["a"] and list(model.peft_config) == ["a"]
    assert not [name for name in model.state_dict() if ".b." in name]
    assert torch.equal(answers(model, "bert"), first) and differ(first, base)
    with pytest.raises(ValueError, match="b does not exist"):
        model.delete_adapter("b")
    # The name is free again, for an adapter of another shape.
    model.add_adapter("b", config(task_type=task_type, num_virtual_tokens=2))
    model.delete_adapter("b")
    model.delete_adapter("a")
    assert not [name for name in model.state_dict() if PREFIX in name]
    if task_type is None:
        assert torch.equal(answers(model.base_model.model, "bert"), base)


@pytest.mark.parametrize("kind", MODELS)
def test_disable_adapter(kind):
    expected = answers(tiny.model(kind, MODELS[kind]), kind)
    model = wrap(kind, MODELS[kind], task_type="SEQ_CLS" if kind == "bert" else None)
    adapted = answers(model, kind)
    assert differ(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(answers(model, kind), expected)
        with pytest.raises(RuntimeError, match="does not require grad"):
            ask(model, kind).mean().backward()
    assert torch.equal(answers(model, kind), adapted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(answers(model, kind), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(answers(model, kind), adapted)


def test_model_status():
    model = wrap("bert", name="a")
    model.add_adapter("b", config(**OTHER))
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["a"] and status.available_adapters == ["a", "b"]
    assert status.peft_types == {"a": "PREFIX_TUNING_V2", "b": "PREFIX_TUNING_V2"}
    assert status.requires_grad == {"a": True, "b": False}
    assert status.trainable_params == N * 3 * COLUMNS["bert"]
    assert "PrefixTuningV2Layer" in [layer.module_type for layer in model.get_layer_status()]


@pytest.mark.parametrize("projection, shift", [(False, True), (True, False)])
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_side_by_side(kind, projection, shift):
    """Two active adapters are one that holds the rows of both."""
    settings = {"shift_positions": shift}
    model = wrap(kind, MODELS[kind], name="a", prefix_projection=projection, **settings)
    model.add_adapter("b", config(num_virtual_tokens=3, **settings))
    draw(model, "b", seed=4)
    alone = answers(model, kind)
    model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]
    both = answers(model, kind)
    assert differ(both, alone)

    tables = []
    if projection:
        model.base_model.fold_adapter("a")
    for name in "ab":
        tables += [p.detach() for key, p in model.named_parameters() if f"{PREFIX}embedding.{name}." in key]
    joined = wrap(kind, MODELS[kind], num_virtual_tokens=N + 3, **settings)
    place = joined.get_parameter(f"base_model.model.prefix_tuning_v2.{PREFIX}embedding.default.weight")
    place.data.copy_(torch.cat(tables))
    assert torch.allclose(answers(joined, kind), both, atol=1e-5)

    # Both are trained.
    ask(model.train(), kind).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if PREFIX in name}
    assert len(gradients) >= 2 and all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_adapters_of_different_layers_side_by_side():
    full = wrap("bert")
    (table,) = [p.detach() for name, p in full.named_parameters() if PREFIX in name]
    model = wrap("bert", name="a", layers_to_transform=[0])
    model.add_adapter("b", config(layers_to_transform=[1, 2]))
    names = {name: f"base_model.model.prefix_tuning_v2.{PREFIX}embedding.{name}.weight" for name in "ab"}
    parts = {names["a"]: table[:, : COLUMNS["bert"]], names["b"]: table[:, COLUMNS["bert"] :]}
    assert not model.load_state_dict(parts, strict=False).unexpected_keys
    one = answers(model, "bert")
    model.base_model.set_adapter(["a", "b"])
    assert torch.allclose(answers(model, "bert"), answers(full, "bert"), atol=1e-5)
    assert differ(one, answers(full, "bert"))


# ---- Where the prefix goes, against attention written out by hand


def by_hand(module, states, prefix, mask=None, source=None, bias=None):
    """Softmax attention of `[batch, tokens, hidden]` with a prefix `[n, 2 * hidden]` in front, for BERT and T5."""
    names = ("query", "key", "value") if hasattr(module, "query") else ("q", "k", "v")
    query, key, value = (getattr(module, name) for name in names)
    source = states if source is None else source

    def heads(tensor):
        return tensor.unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)

    keys, values = prefix.chunk(2, dim=-1)
    keys = torch.cat([heads(keys.expand(states.shape[0], -1, -1)), heads(key(source))], dim=2)
    values = torch.cat([heads(values.expand(states.shape[0], -1, -1)), heads(value(source))], dim=2)
    queries = heads(query(states))
    scores = queries @ keys.transpose(2, 3) * (queries.shape[-1] ** -0.5 if hasattr(module, "query") else 1.0)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~F.pad(mask, (prefix.shape[0], 0), value=True), -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("layers", [[1], [0, 2], None])
def test_bert_prefix_by_hand(layers):
    model = wrap("bert", layers_to_transform=layers)
    (table,) = [p.detach() for name, p in model.named_parameters() if PREFIX in name]
    layers = layers or [0, 1, 2]
    assert table.shape == (N, len(layers) * COLUMNS["bert"])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    base = tiny.model("bert")
    without = answers(base, "bert", attention_mask=mask.long())
    for part, layer in zip(table.split(COLUMNS["bert"], dim=1), layers, strict=True):

        def hook(module, args, kwargs, output, part=part):
            states = args[0] if args else kwargs["hidden_states"]
            return by_hand(module, states, part, mask[:, None, None]), output[1]

        base.encoder.layer[layer].attention.self.register_forward_hook(hook, with_kwargs=True)
    expected = answers(base, "bert", attention_mask=mask.long())
    assert torch.allclose(answers(model, "bert", attention_mask=mask.long()), expected, atol=1e-5)
    assert differ(expected, without)


@pytest.mark.parametrize("layers", [[1], [0, 2], None])
def test_t5_prefix_by_hand(layers):
    """The first layer computes the position bias of all, whether it has a prefix or not."""
    model = wrap("t5", "AutoModelForSeq2SeqLM", changes=CALM["t5"], layers_to_transform=layers)
    (table,) = [p.detach() for name, p in model.named_parameters() if PREFIX in name]
    base = tiny.model("t5", "AutoModelForSeq2SeqLM", **CALM["t5"])
    without, layers, length = answers(base, "t5"), layers or [0, 1, 2], {"encoder": 7, "decoder": 5}
    sites = [("encoder", layer, 0) for layer in layers] + [("decoder", layer, 0) for layer in layers]
    sites += [("decoder", layer, 1) for layer in layers]
    assert table.shape == (N, len(sites) * COLUMNS["t5"])

    for part, (side, layer, sublayer) in zip(table.split(COLUMNS["t5"], dim=1), sites, strict=True):
        stack = getattr(base, side)
        module = getattr(stack.block[layer].layer[sublayer], "EncDecAttention" if sublayer else "SelfAttention")
        tokens, bias, mask = length[side], None, None
        if not sublayer:
            bias = stack.block[0].layer[0].SelfAttention.compute_bias(tokens, N + tokens, past_seen_tokens=N)
        if side == "decoder" and not sublayer:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()

        def hook(module, args, kwargs, output, part=part, bias=bias, mask=mask):
            hidden = by_hand(module, args[0], part, mask, kwargs.get("key_value_states"), bias)
            return (module.o(hidden), *output[1:])

        module.register_forward_hook(hook, with_kwargs=True)
    expected = answers(base, "t5")
    assert torch.allclose(answers(model, "t5"), expected, atol=1e-5)
    assert differ(expected, without)


# ---- Unloading


def footprint(model) -> tuple:
    """All that could be left of an adapter: modules, parameters, hooks, attributes."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = {
        name: (type(module), {key: len(getattr(module, key)) for key in hooks})
        for name, module in model.named_modules()
    }
    # What transformers itself notes on a model for gradient checkpointing stays there after every PEFT method.
    attributes = {name for name in vars(model) if not name.startswith(("_gradient_checkpointing", "_require_grads"))}
    return modules, [name for name, _ in model.named_parameters()], attributes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_unload_gives_the_base_model_back(kind, checkpointing):
    base = tiny.model(kind)
    before, state, expected = footprint(base), copy.deepcopy(base.state_dict()), answers(base, kind)
    for round_ in range(2):
        model = get_peft_model(base, config(prefix_projection=bool(round_)))
        draw(model, "default")
        assert differ(answers(model.eval(), kind), expected)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        ask(model.train(), kind, use_cache=False).square().mean().backward()
        if checkpointing:
            model.gradient_checkpointing_disable()
        assert model.unload() is base
        if checkpointing:
            base.disable_input_require_grads()
        base.zero_grad()
        base.eval()
        assert footprint(base) == before
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
        assert torch.equal(answers(base, kind), expected)


@pytest.mark.parametrize("kind", ["bert", "roberta"])  # a linear layer, and a head of several
def test_unload_keeps_the_trained_head_as_peft_does(kind):
    model = wrap(kind, MODELS["bert"], task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    plain, base = tiny.model(kind, MODELS["bert"]), model.unload()
    assert footprint(base) == footprint(plain)
    assert base.classifier is head and differ(answers(base, kind), answers(plain, kind))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(kind, method):
    model = wrap(kind, MODELS[kind], task_type="SEQ_CLS" if kind == "bert" else None)
    expected, before = answers(model, kind), footprint(model)
    with pytest.raises(ValueError, match=r"A prefix cannot be merged.*`unload`"):
        getattr(model, method)()
    assert footprint(model) == before
    assert torch.equal(answers(model, kind), expected) and differ(expected, base_of(model, kind))


# ---- With LoRA


def lora_first(base):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), base, "lora")
    return get_peft_model(base, config())


def lora_model_first(base):
    return get_peft_model(get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"])), config())


def lora_last(base):
    model = get_peft_model(base, config())
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), model, "lora")


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
@pytest.mark.parametrize("combine", [lora_first, lora_model_first, lora_last])
def test_trained_together_with_lora(combine):
    model = combine(tiny.model("bert")).eval()
    before = answers(model, "bert")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or PREFIX in name}
    assert len(trained) == 3 * 2 * 2 + 1
    state = parameters_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model(input_ids=tiny.ids(2)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name for name, p in model.named_parameters() if not torch.equal(p, state[name])} == trained
    assert differ(answers(model, "bert"), before)


def test_peft_mixed_model_refuses_in_words():
    """`PeftMixedModel` keeps a closed list of methods; until it is open, no prefix is pretended to be there."""
    with pytest.raises(ValueError, match="PREFIX_TUNING_V2' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny.model("bert"), config(), mixed=True)
    model = get_peft_model(tiny.model("bert"), LoraConfig(r=2, target_modules=["query"]), mixed=True)
    with pytest.raises(ValueError, match="PREFIX_TUNING_V2' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("prefix", config())


# ---- Loading without memory, copies


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_low_cpu_mem_usage(kind, projection, tmp_path):
    task = {"task_type": "SEQ_CLS" if kind == "bert" else None}
    trained = wrap(kind, MODELS[kind], prefix_projection=projection, **task)
    expected = answers(trained, kind)
    assert differ(expected, base_of(trained, kind))
    trained.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny.model(kind, MODELS[kind]), str(tmp_path), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(answers(loaded, kind), expected)

    empty = get_peft_model(
        tiny.model(kind, MODELS[kind]), config(prefix_projection=projection, **task), low_cpu_mem_usage=True
    )
    prefix = [parameter for name, parameter in empty.named_parameters() if PREFIX in name]
    assert prefix and all(parameter.is_meta for parameter in prefix)
    weights = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert not peft.set_peft_model_state_dict(empty, weights, low_cpu_mem_usage=True).unexpected_keys
    assert torch.equal(answers(empty.eval(), kind), expected)

    trained.load_adapter(str(tmp_path), adapter_name="again", low_cpu_mem_usage=True)
    draw(trained, "default", seed=8)
    assert differ(answers(trained, kind), expected)
    trained.set_adapter("again")
    assert torch.equal(answers(trained, kind), expected)


def injected(base, settings):
    return inject_adapter_in_model(settings, base, "b", low_cpu_mem_usage=True)


def added(base, settings):
    model = get_peft_model(base, config(task_type="SEQ_CLS"))
    model.add_adapter("b", settings, low_cpu_mem_usage=True)
    model.set_adapter("b")
    return model


@pytest.mark.parametrize("make", [injected, added])
def test_low_cpu_mem_usage_of_a_further_adapter(make, tmp_path):
    """Only what is made is on the meta device; the backbone is looked at as ever."""
    settings = {"prefix_projection": True, "encoder_hidden_size": 8, "modules_to_save": ["classifier"]}
    trained = wrap("bert", MODELS["bert"], **settings)
    trained.save_pretrained(tmp_path)
    model = make(tiny.model("bert", MODELS["bert"]), config(**settings))
    ours = {name: parameter for name, parameter in model.named_parameters() if f"{PREFIX}" in name and ".b." in name}
    assert len(ours) == 5 and all(parameter.is_meta for parameter in ours.values())
    assert not any(p.is_meta for name, p in model.named_parameters() if name not in ours)
    weights = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    if make is injected:  # PEFT's names are those in a `PeftModel`
        weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    missing = peft.set_peft_model_state_dict(model, weights, "b", low_cpu_mem_usage=True).missing_keys
    assert not [name for name in missing if ".b." in name]
    found, expected = (
        {name.removeprefix("base_model.model.").replace(f".{adapter}.", "."): parameter.data
         for name, parameter in each.named_parameters() if f".{adapter}." in name}
        for each, adapter in ((model, "b"), (trained, "default"))
    )  # fmt: skip
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        # Not bit for bit: loaded weights lie elsewhere in memory, and some CPUs then round products differently.
        torch.testing.assert_close(model.eval()(tiny.ids()).logits, trained.eval()(tiny.ids()).logits)


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_copies_are_independent(kind, duplicate, frozen):
    model = wrap(kind, MODELS[kind], prefix_projection=True, task_type="SEQ_CLS" if kind == "bert" else None)
    if frozen:
        # What an adapter for inference keeps ready must not be shared either.
        model.requires_grad_(False)
    expected, base = answers(model, kind), base_of(model, kind)
    assert differ(expected, base)
    if frozen:
        # `disable_adapter` has switched it on again, as PEFT does for every method.
        model.requires_grad_(False)
    twin = duplicate(model)
    assert torch.equal(answers(twin, kind), expected)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}

    draw(twin, "default", seed=6)
    changed = answers(twin, kind)
    assert differ(changed, expected) and differ(changed, base)
    assert torch.equal(answers(model, kind), expected)
    draw(model, "default", seed=6)
    assert torch.equal(answers(model, kind), changed)
    assert torch.equal(base_of(twin, kind), base)
    if not frozen:
        ask(twin, kind).square().mean().backward()
        assert any(p.grad is not None for p in twin.parameters())
        assert all(p.grad is None for p in model.parameters())
    twin.unload()
    assert torch.equal(answers(model, kind), changed)


def test_frozen_prefix_follows_its_parameters():
    """What is kept ready for inference is dropped however the parameters change."""
    model = wrap("bert", prefix_projection=True)
    model.requires_grad_(False)
    other = wrap("bert", prefix_projection=True)
    draw(other, "default", seed=7)
    first, expected = answers(model, "bert"), answers(other, "bert")
    assert differ(first, expected)
    states = {"first": copy.deepcopy(model.state_dict()), "second": copy.deepcopy(other.state_dict())}
    model.load_state_dict(states["second"])
    assert torch.equal(answers(model, "bert"), expected)
    model.load_state_dict(states["first"], assign=True)
    assert torch.equal(answers(model, "bert"), first)
    for name, parameter in model.named_parameters():
        if PREFIX in name:
            parameter.data = states["second"][name].clone()
    assert torch.equal(answers(model, "bert"), expected)


# ---- Gradient checkpointing


def gradients_of(model, kind: str, forwards: int = 1) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # All forwards before the one backward: what is computed again there must not come from the last forward.
    inputs = [tiny.ids(2, seed=20 + index) for index in range(forwards)]
    sum(ask(model, kind, input_ids=ids, use_cache=False).square().mean() for ids in inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_switched_on_after_wrapping(kind, reentrant, projection):
    settings = {"prefix_projection": projection, "changes": NO_DROPOUT[kind]}
    settings["task_type"] = "SEQ_CLS" if kind == "bert" else None
    expected = gradients_of(wrap(kind, MODELS[kind], **settings).train(), kind, forwards=2)

    model = wrap(kind, MODELS[kind], **settings).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    result = gradients_of(model, kind, forwards=2)
    assert result.keys() == expected.keys() and any(PREFIX in name for name in result)
    for name, gradient in result.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
        assert (gradient != 0).all(), f"{name} has dead elements"

    model.gradient_checkpointing_disable()
    again = gradients_of(model, kind, forwards=2)
    assert all(torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6) for name, gradient in again.items())


def test_gradient_checkpointing_switched_on_before_wrapping():
    expected = gradients_of(wrap("llama", MODELS["llama"]).train(), "llama")
    base = tiny.model("llama", MODELS["llama"])
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, config())
    draw(model, "default")
    result = gradients_of(model.train(), "llama")
    assert result.keys() == expected.keys()
    assert all(torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6) for name, gradient in result.items())


def test_gradient_checkpointing_replays_the_same_dropout():
    """Reentrant or not, the second forward of a layer draws the masks of the first."""
    results = []
    for reentrant in (None, False, True):
        model = wrap("llama", MODELS["llama"], prefix_dropout=0.3).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        results.append(gradients_of(model, "llama"))
    for result in results[1:]:
        for name, gradient in result.items():
            assert torch.allclose(gradient, results[0][name], rtol=1e-4, atol=1e-6), name


def test_registered_with_peft():
    kind = prefix_adapter.PrefixTuningV2Type.PREFIX_TUNING_V2
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_TUNING_V2"] is PrefixTuningV2Config
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is prefix_adapter.PrefixTuningV2Model
    model = wrap("bert")
    assert type(model) is PeftModel and isinstance(model.base_model, prefix_adapter.PrefixTuningV2Model)
    assert type(wrap("bert", MODELS["bert"], task_type="SEQ_CLS")) is peft.PeftModelForSequenceClassification


# ---- What PEFT and torch do with every adapter


class Around(torch.nn.Module):
    """A module of somebody's own around a backbone, with arguments of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.out = tiny.model("bert"), torch.nn.Linear(tiny.HIDDEN, 3)

    def forward(self, ids, mask):
        return self.out(self.encoder(input_ids=ids, attention_mask=mask)[0][:, 0])


def test_a_module_around_a_backbone():
    with pytest.raises(prefix_adapter.UnsupportedBackboneError, match=r"Around is a module around BertModel") as error:
        get_peft_model(Around(), config())
    assert "`model.encoder = get_peft_model(model.encoder, config)`" in str(error.value)
    model, ids = Around(), tiny.ids()
    mask = torch.ones_like(ids)
    before = model(ids, mask)
    model.encoder = get_peft_model(model.encoder, config(init_std=1.0)).eval()
    model(ids, mask).sum().backward()
    assert differ(model(ids, mask), before)
    assert [name for name, p in model.named_parameters() if p.grad is not None and PREFIX in name]


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
@pytest.mark.parametrize("beside", [False, True])
def test_unmerging_and_input_casting(beside):
    """PEFT asks every tuner layer for both, those of a LoRA beside ours too."""
    model = wrap("bert", MODELS["bert"])
    if beside:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]), "lora").eval()
    expected = answers(model, "bert")
    model.unmerge_adapter()
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(answers(model, "bert"), expected)
    assert torch.equal(answers(model, "bert"), expected)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace(projection, trainable, grad):
    """`torch.jit.trace` makes two traces and compares them: nothing that the first leaves may be in the second."""
    model = wrap("llama", MODELS["llama"], prefix_projection=projection)
    model.requires_grad_(trainable)
    answers(model, "llama")
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(Logits(model), (tiny.ids(),))
    other = tiny.ids(seed=9)
    torch.testing.assert_close(traced(other), model(input_ids=other).logits)
