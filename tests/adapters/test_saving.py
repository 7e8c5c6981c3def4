"""Saving and loading: files, configs, resumed training, `AutoPeftModel`, folding."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import peft
import pytest
import tiny
import tokenizers
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config, fold

N, WIDTH = 4, 8
KEY = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Backbone, auto class, task type, columns of the prefix in the tiny model, keys and shapes of the head.
CASES = {
    "bert": (
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        3 * 64,
        {"classifier.weight": [3, 32], "classifier.bias": [3]},
    ),
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM", 3 * 32, {}),
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", 9 * 64, {}),
}
AUTO = {
    "AutoPeftModelForSequenceClassification": ("bert", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "AutoPeftModelForTokenClassification": ("bert", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "AutoPeftModelForQuestionAnswering": ("bert", "AutoModelForQuestionAnswering", "QUESTION_ANS"),
    "AutoPeftModelForCausalLM": ("llama", "AutoModelForCausalLM", "CAUSAL_LM"),
    "AutoPeftModelForSeq2SeqLM": ("t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "AutoPeftModelForFeatureExtraction": ("bert", "AutoModel", "FEATURE_EXTRACTION"),
    "AutoPeftModel": ("bert", "AutoModelForMaskedLM", None),
}


def config(projection: bool = False, **settings) -> PrefixTuningV2Config:
    if projection:
        settings = {"prefix_projection": True, "encoder_hidden_size": WIDTH, **settings}
    return PrefixTuningV2Config(**{"num_virtual_tokens": N, "prefix_dropout": 0.0, **settings})


def case(kind: str, projection: bool = False, name: str = "default", **settings) -> PeftModel:
    """A tiny model with an adapter that has a large effect."""
    auto_class, task_type = CASES[kind][:2]
    settings = {"task_type": task_type, **settings}
    model = get_peft_model(tiny.model(kind, auto_class), config(projection, **settings), adapter_name=name)
    return draw(model, name).eval()


def draw(model, name: str = "default", seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def fresh(kind: str, **changes):
    return tiny.model(kind, CASES[kind][0], **changes)


def inputs_of(kind: str, seed: int = 1) -> dict:
    inputs = {"input_ids": tiny.ids(2, seed=seed)}
    if kind == "t5":
        inputs["decoder_input_ids"] = tiny.ids(2, 5, seed=seed + 50)
    return inputs


@torch.no_grad()
def answers(model, kind: str) -> torch.Tensor:
    output = model.eval()(**inputs_of(kind))
    return output.logits if "logits" in output else output[0]


def differ(left: torch.Tensor, right: torch.Tensor, by: float = 1e-3) -> bool:
    return (left - right).abs().max().item() > by


def expected_shapes(kind: str, projection: bool) -> dict[str, list[int]]:
    columns, head = CASES[kind][2:]
    if projection:
        shapes = {
            "embedding.weight": [N, 32],
            "hidden.weight": [WIDTH, 32],
            "hidden.bias": [WIDTH],
            "output.weight": [columns, WIDTH],
            "output.bias": [columns],
        }
    else:
        shapes = {"embedding.weight": [N, columns]}
    prefix = {KEY + name: shape for name, shape in shapes.items()}
    return prefix | {f"base_model.model.{name}": shape for name, shape in head.items()}


def check_file(path: Path, shapes: dict[str, list[int]]) -> None:
    """Assert that the file has exactly these tensors, in float32."""
    with safe_open(path, "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == shapes  # noqa: SIM118
        assert {file.get_slice(key).get_dtype() for key in shapes} == {"F32"}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert path.stat().st_size == 8 + header + 4 * numbers


# ---- Saving


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_saved_tensors_and_files(kind, projection, tmp_path):
    model = case(kind, projection)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    check_file(tmp_path / WEIGHTS, expected_shapes(kind, projection))
    saved = load_file(tmp_path / WEIGHTS)
    state = model.state_dict()
    for key, tensor in saved.items():
        stem, _, last = key.rpartition(".")
        name = f"{stem}.default.{last}" if key.startswith(KEY) else f"{stem}.modules_to_save.default.{last}"
        assert torch.equal(tensor, state[name]), key


def test_each_adapter_in_a_folder_of_its_name(tmp_path):
    model = case("bert", name="first")
    model.add_adapter("second", config(True, task_type="SEQ_CLS", layers_to_transform=[1]))
    draw(model, "second", seed=4)
    outputs = {"first": answers(model, "bert")}
    model.set_adapter("second")
    outputs["second"] = answers(model, "bert")
    assert differ(outputs["first"], outputs["second"])
    model.save_pretrained(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"first", "second", "README.md"}
    check_file(tmp_path / "both" / "first" / WEIGHTS, expected_shapes("bert", False))
    for name, expected in outputs.items():
        loaded = PeftModel.from_pretrained(fresh("bert"), str(tmp_path / "both" / name), adapter_name="a_third")
        assert loaded.active_adapters == ["a_third"]
        assert torch.equal(answers(loaded, "bert"), expected)

    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert {path.name for path in (tmp_path / "one").iterdir() if path.is_dir()} == {"second"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", CASES)
def test_a_second_save_changes_nothing(kind, tmp_path):
    model = case(kind)
    model.save_pretrained(tmp_path)
    first = files(tmp_path)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == first
    loaded = PeftModel.from_pretrained(fresh(kind), tmp_path)
    loaded.save_pretrained(tmp_path)
    assert files(tmp_path)["README.md"] == first["README.md"] and files(tmp_path)[WEIGHTS] == first[WEIGHTS]
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nA word of mine.\n")
    model.save_pretrained(tmp_path)
    mine = files(tmp_path)
    assert b"\nA word of mine.\n" in mine["README.md"]
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == mine


@pytest.mark.parametrize("earlier", [None, "safetensors", "pickle"])
def test_no_pickle_is_written(earlier, tmp_path):
    """This package reads no pickles, so it would be of no use."""
    model = case("bert")
    if earlier == "safetensors":
        draw(case("bert"), seed=8).save_pretrained(tmp_path)
    if earlier == "pickle":
        torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.warns(UserWarning, match="written to adapter_model.safetensors nevertheless"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    check_file(tmp_path / WEIGHTS, expected_shapes("bert", False))
    assert torch.equal(answers(PeftModel.from_pretrained(fresh("bert"), tmp_path), "bert"), answers(model, "bert"))


def test_no_pickle_is_written_for_any_of_several(tmp_path):
    model = case("llama", name="first")
    model.add_adapter("second", config(True, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="nevertheless"):
        model.save_pretrained(tmp_path, safe_serialization=False, save_embedding_layers=True)
    for name in ("first", "second"):
        assert not (tmp_path / name / "adapter_model.bin").exists()
        loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / name)
        model.set_adapter(name)
        assert torch.equal(answers(loaded, "llama"), answers(model, "llama"))


def test_pickle_of_another_model_is_kept(tmp_path):
    torch.save({}, tmp_path / "adapter_model.bin")
    before = files(tmp_path)
    config().save_pretrained(tmp_path)
    case("bert").save_pretrained(tmp_path)
    assert files(tmp_path)["adapter_model.bin"] == before["adapter_model.bin"]


@pytest.mark.parametrize("left", [0, 2_000, 12_000])
def test_a_full_disk_leaves_the_adapter_that_was_there(left, tmp_path, small_disk):
    """The limit leaves room for this number of further bytes."""
    model = case("bert")
    model.save_pretrained(small_disk)
    before = answers(PeftModel.from_pretrained(fresh("bert"), small_disk), "bert")
    other = draw(case("bert"), seed=8)
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))
    try:
        other.save_pretrained(small_disk)
    except Exception as error:
        assert "No space left" in str(error)
        expected = before
    else:
        expected = answers(other, "bert")
    assert torch.equal(answers(PeftModel.from_pretrained(fresh("bert"), small_disk), "bert"), expected)
    assert {path.name for path in small_disk.iterdir()} == {WEIGHTS, CONFIG, "README.md", "filler"}


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", [CONFIG, "README.md"])
def test_a_write_that_fails_leaves_what_was_there(name, tmp_path, monkeypatch):
    model = case("bert")
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    replace = os.replace

    def fail(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    # PEFT has already replaced the card.
    assert {**files(tmp_path), "README.md": b""} == {**before, "README.md": b""}


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_card_that_is_a_link_or_a_pipe(kind, tmp_path):
    """In a stranger's folder, saving writes through no link and does not wait for a pipe."""
    card, other = tmp_path / "adapter" / "README.md", tmp_path / "other"
    card.parent.mkdir()
    other.write_text("mine")
    if kind == "link":
        card.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(card)
    else:
        card.mkdir()
    if kind == "folder":
        with pytest.raises(OSError):
            config().save_pretrained(card.parent)
    else:
        config().save_pretrained(card.parent)
        assert card.is_file() and not card.is_symlink() and "mine" not in card.read_text()
    assert other.read_text() == "mine"


# ---- Loading


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_reload_is_bit_equal(kind, projection, trainable, tmp_path):
    model = case(kind, projection)
    expected = answers(model, kind)
    model.save_pretrained(tmp_path)
    base = fresh(kind)
    assert differ(expected, answers(base, kind))
    loaded = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=trainable)
    assert torch.equal(answers(loaded, kind), expected)

    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == ({name for name, p in model.named_parameters() if p.requires_grad} if trainable else set())
    assert loaded.peft_config["default"].inference_mode is not trainable
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, tmp_path / "again"))
    # PEFT adds the names of the heads again at every load.
    assert set(new.pop("modules_to_save") or ()) == set(old.pop("modules_to_save") or ())
    assert new == old


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_training_goes_on_as_if_never_interrupted(kind, projection, dropout, tmp_path):
    still = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"], "llama": [], "t5": ["dropout_rate"]}
    changes = dict.fromkeys(still[kind], dropout)

    def optimizer_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(model, optimizer, steps):
        model.train()
        for step in steps:
            inputs = inputs_of(kind, seed=step)
            labels = torch.tensor([0, 2]) if kind == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
            optimizer.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()

    def trained(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    model = get_peft_model(
        fresh(kind, **changes), config(projection, task_type=CASES[kind][1], prefix_dropout=dropout)
    )
    optimizer, start = optimizer_of(model), trained(model)
    train(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    random_state, middle = torch.get_rng_state(), trained(model)
    train(model, optimizer, range(3, 6))
    expected = trained(model)

    resumed = PeftModel.from_pretrained(fresh(kind, **changes), str(tmp_path), is_trainable=True)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    if dropout:
        torch.set_rng_state(random_state)
    train(resumed, optimizer, range(3, 6))
    result = trained(resumed)
    assert list(result) == list(expected)
    for name, parameter in result.items():
        assert torch.equal(parameter, expected[name]), name
        assert differ(parameter, middle[name], 0) and differ(middle[name], start[name], 0), name


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("auto_class", AUTO)
def test_auto_peft_model(auto_class, projection, tmp_path):
    kind, base_class, task_type = AUTO[auto_class]
    labels = {"num_labels": 2} if task_type == "QUESTION_ANS" else {}
    tiny.model(kind, base_class, **labels).save_pretrained(tmp_path / "base")
    base = getattr(transformers, base_class).from_pretrained(tmp_path / "base").eval()

    def first(model):
        with torch.no_grad():
            return model.eval()(**inputs_of(kind))[0]

    unadapted = first(base)
    model = draw(get_peft_model(base, config(projection, task_type=task_type)))
    expected = first(model)
    model.save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        loaded = getattr(peft, auto_class).from_pretrained(tmp_path / "adapter", is_trainable=trainable)
        assert type(loaded) is type(model)
        assert torch.equal(first(loaded), expected) and differ(expected, unadapted)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) is trainable


EVERY_FIELD = {
    "num_virtual_tokens": 7,
    "prefix_projection": True,
    "encoder_hidden_size": 12,
    "prefix_dropout": 0.25,
    "init_std": 0.125,
    "layers_to_transform": [0, 2],
    "target_attention": ["encoder", "cross"],
    "entry_point": "attention",
    "num_frozen_tokens": 0,  # an MLP has none
    "lora_r": 2,
    "strength": 0.5,
    "shift_positions": True,
    "modules_to_save": ["lm_head"],
    "label_names": ["no", "yes"],
    "prefix_layout": "encoder 0,2: 4x8+4x8; cross 0,2: 4x8+4x8",
    "task_type": "SEQ_2_SEQ_LM",
    "revision": "main",
}


@pytest.mark.parametrize(
    "settings", [{}, EVERY_FIELD, {"layers_to_transform": 1}, {"task_type": "SEQ_CLS"}, {"num_frozen_tokens": 2}]
)
def test_config_round_trip(settings, tmp_path):
    before = PrefixTuningV2Config(**settings)
    before.save_pretrained(tmp_path)
    after = PeftConfig.from_pretrained(str(tmp_path))
    assert type(after) is PrefixTuningV2Config
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["peft_type"] == "PREFIX_TUNING_V2"
    own = {item.name for item in dataclasses.fields(PrefixTuningV2Config)}
    for name in own - {"auto_mapping", "peft_version", "inference_mode"}:
        assert getattr(after, name) == getattr(before, name), name
        assert type(getattr(after, name)) is type(getattr(before, name)) or name == "task_type", name
        assert name in written, name
    for name, value in settings.items():
        assert getattr(after, name) == ([value] if name == "layers_to_transform" and isinstance(value, int) else value)
    assert set(EVERY_FIELD) >= {item.name for item in dataclasses.fields(PrefixTuningV2Config)} - {
        item.name for item in dataclasses.fields(PeftConfig)
    }


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}])
def test_base_model_of_another_shape(change, low_cpu_mem_usage, projection, tmp_path):
    case("bert", projection).save_pretrained(tmp_path)
    layout = "encoder 0,1: 4x8+4x8" if "num_hidden_layers" in change else "encoder 0,1,2: 4x16+4x16"
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(fresh("bert", **change), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert "encoder 0,1,2: 4x8+4x8, while" in str(error.value) and f"has {layout}." in str(error.value)


def test_ignoring_mismatched_sizes_leaves_no_random_weights(tmp_path):
    case("bert", False, task_type="SEQ_CLS").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`ignore_mismatched_sizes` has no effect") as error:
        PeftModel.from_pretrained(fresh("bert", num_labels=9), tmp_path, ignore_mismatched_sizes=True)
    assert "classifier" in str(error.value) and "prefix_adapter.init_from" in str(error.value)
    # The solution that the error names.
    model = get_peft_model(fresh("bert", num_labels=9), config(task_type="SEQ_CLS"))
    prefix_adapter.init_from(model, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)[f"{KEY}embedding.weight"]
    assert torch.equal(model.get_parameter(f"{KEY}embedding.default.weight"), saved)


def test_key_mapping(tmp_path):
    case("bert", False).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    weights = {name.replace("prefix_tuning_v2.", "old.", 1): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"it lacks .*`key_mapping` is not used for this method"):
        PeftModel.from_pretrained(fresh("bert"), tmp_path, key_mapping={"^old": "prefix_tuning_v2"})


@pytest.mark.parametrize("projection", [False, True])
def test_weights_that_do_not_fit_their_own_config(projection, tmp_path):
    case("bert", projection).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "prefix_layout": None, "layers_to_transform": [0, 1]}))
    with pytest.raises(ValueError, match="does not fit its config") as error:
        PeftModel.from_pretrained(fresh("bert"), str(tmp_path))
    shapes = ["output.bias has the shape [192] where [128]", "output.weight has the shape [192, 8] where [128, 8]"]
    if not projection:
        shapes = ["embedding.weight has the shape [4, 192] where [4, 128]"]
    assert any(KEY + shape in str(error.value) for shape in shapes)


def test_base_model_with_too_few_layers(tmp_path):
    case("bert", layers_to_transform=[2]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`layers_to_transform` names \[2\].*are \[0, 1\]"):
        PeftModel.from_pretrained(fresh("bert", num_hidden_layers=2), str(tmp_path))


# ---- Folding


@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [1], "shift_positions": True}], ids=["all", "one"])
@pytest.mark.parametrize("kind", CASES)
def test_fold_a_saved_adapter(kind, settings, tmp_path):
    model = case(kind, True, **settings)
    expected = answers(model, kind)
    model.save_pretrained(tmp_path / "mlp")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mlp").iterdir()}
    target = tmp_path / "new" / "folded"
    assert fold(tmp_path / "mlp", target) == target
    assert {path.name: path.read_bytes() for path in (tmp_path / "mlp").iterdir()} == before

    shapes = expected_shapes(kind, False)
    if settings:
        shapes[f"{KEY}embedding.weight"][1] //= 3
    check_file(target / WEIGHTS, shapes)
    old, new = (PeftConfig.from_pretrained(str(folder)).to_dict() for folder in (tmp_path / "mlp", target))
    assert new == {**old, "prefix_projection": False, "encoder_hidden_size": None}
    weights, folded = load_file(tmp_path / "mlp" / WEIGHTS), load_file(target / WEIGHTS)
    for key in CASES[kind][3]:
        assert torch.equal(folded[f"base_model.model.{key}"], weights[f"base_model.model.{key}"])

    base = fresh(kind)
    unadapted = answers(base, kind)
    loaded = PeftModel.from_pretrained(base, str(target))
    assert not [name for name in loaded.state_dict() if "_hidden." in name or "_output." in name]
    assert torch.allclose(answers(loaded, kind), expected, rtol=1e-6, atol=1e-6)
    assert differ(expected, unadapted)


def test_fold_keeps_the_text_of_the_card_and_the_files_of_a_run(tmp_path):
    case("bert", True).save_pretrained(tmp_path / "mlp")
    card = tmp_path / "mlp" / "README.md"
    assert "prefix-adapter fold" in card.read_text()
    card.write_text(card.read_text().replace("---\n", "---\nlanguage: de\n", 1) + "\nA word of mine.\n")
    (tmp_path / "mlp" / "recipe.yaml").write_text("task: x\n")
    fold(tmp_path / "mlp", tmp_path / "folded")
    text = (tmp_path / "folded" / "README.md").read_text()
    assert "language: de\n" in text and text.endswith("\nA word of mine.\n") and text.count("\n# ") == 1
    assert "prefix-adapter fold" not in text and "there is no MLP to fold" in text
    assert (tmp_path / "folded" / "recipe.yaml").read_text() == "task: x\n"
    card.write_text("---\n[\n---\n")
    with pytest.raises(ValueError, match=r"README.md cannot be read as a model card"):
        fold(tmp_path / "mlp", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_fold_a_loaded_adapter(kind, trainable, tmp_path):
    case(kind, True).save_pretrained(tmp_path / "mlp")
    model = PeftModel.from_pretrained(fresh(kind), str(tmp_path / "mlp"), is_trainable=trainable)
    expected = answers(model, kind)
    heads = {name: p.clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    model.fold_adapter()
    assert torch.allclose(answers(model, kind), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(parameter, heads[name]) for name, parameter in model.named_parameters() if name in heads)
    assert differ(expected, answers(fresh(kind), kind))
    table = model.get_parameter(f"{KEY}embedding.default.weight")
    assert table.requires_grad is trainable and table.shape == (N, CASES[kind][2])

    model.save_pretrained(tmp_path / "folded")
    check_file(tmp_path / "folded" / WEIGHTS, expected_shapes(kind, False))
    again = PeftModel.from_pretrained(fresh(kind), str(tmp_path / "folded"))
    assert torch.equal(answers(again, kind), answers(model, kind))
    fold(tmp_path / "mlp", tmp_path / "other")
    one, other = load_file(tmp_path / "folded" / WEIGHTS), load_file(tmp_path / "other" / WEIGHTS)
    assert one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=1e-6, atol=1e-6) for key in one
    )
    with pytest.raises(ValueError, match="table already"):
        model.fold_adapter()
    if trainable:
        model.train()(**inputs_of(kind))[0].square().mean().backward()
        assert table.grad.any()


def test_fold_one_adapter_of_several():
    model = case("bert", True, name="first")
    model.add_adapter("second", config(True, task_type="SEQ_CLS"))
    draw(model, "second", seed=4)
    first = answers(model, "bert")
    model.set_adapter("second")
    second = answers(model, "bert")
    with pytest.raises(ValueError, match=r"no prefix adapter 'default'; there are \['first', 'second'\]"):
        model.fold_adapter()
    model.fold_adapter("first")
    assert model.active_adapters == ["second"]
    assert torch.equal(answers(model, "bert"), second) and differ(first, second)
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".first." in name} == set()
    model.set_adapter("first")
    assert torch.allclose(answers(model, "bert"), first, rtol=1e-6, atol=1e-6)
    assert not model.peft_config["first"].prefix_projection and model.peft_config["second"].prefix_projection


def folder_of(kind: str, folder: Path) -> None:
    """Make a folder that cannot be folded."""
    if kind == "lora":
        get_peft_model(tiny.model("bert"), LoraConfig(target_modules=["query"])).save_pretrained(folder)
        return
    case("bert", projection=kind != "table").save_pretrained(folder)
    if kind in ("part of the weights", "no weights"):
        weights = load_file(folder / WEIGHTS)
        kept = {k: v for k, v in weights.items() if kind == "part of the weights" and not k.startswith(f"{KEY}output")}
        prefix_adapter.adapters.saved.save_file(kept, folder / WEIGHTS)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("table", "is a table already"),
        ("lora", "LORA adapter, not one of this package"),
        ("part of the weights", r"it lacks output\.bias, output\.weight"),
        ("no weights", "weight"),
    ],
)
def test_fold_refuses(kind, words, tmp_path):
    folder_of(kind, tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        fold(tmp_path / "source", tmp_path / "target")
    assert sorted(tmp_path.rglob("*")) == before


def test_fold_leaves_what_exists_alone(tmp_path):
    case("bert", True).save_pretrained(tmp_path / "source")
    for target in (tmp_path / "source", tmp_path / "empty"):
        target.mkdir(exist_ok=True)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(FileExistsError, match=f"{target} exists"):
            fold(tmp_path / "source", target)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_fold_that_fails_while_writing_leaves_nothing(tmp_path, monkeypatch):
    case("bert", True).save_pretrained(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(PrefixTuningV2Config, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        fold(tmp_path / "source", tmp_path / "target")
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_for_bert_base(tmp_path):
    """The published file is the table: 20 tokens x 12 layers x 2 x 768 numbers, whatever the MLP weighs."""
    shape = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 8}
    base = tiny.model("bert", **shape)
    settings = {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 512}
    model = draw(get_peft_model(base, PrefixTuningV2Config(**settings)))
    expected = answers(model, "bert")
    model.save_pretrained(tmp_path / "mlp")
    fold(tmp_path / "mlp", tmp_path / "folded")
    mlp, folded = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("mlp", "folded"))
    assert 0 <= folded - 4 * 20 * 12 * 2 * 768 < 1000 and folded == pytest.approx(1.5e6, rel=0.05)
    numbers = 20 * 768 + 768 * 512 + 512 + 512 * 12 * 2 * 768 + 12 * 2 * 768
    assert 0 <= mlp - 4 * numbers < 1000 and mlp == pytest.approx(40e6, rel=0.05)
    loaded = PeftModel.from_pretrained(model.unload(), str(tmp_path / "folded"))
    assert torch.allclose(answers(loaded, "bert"), expected, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        assert differ(answers(loaded, "bert"), expected)


def test_base_model_with_as_many_columns_in_other_layers(tmp_path):
    """6 layers of 768 have as many columns as 12 of 384. They differ in the layout alone."""
    model = get_peft_model(tiny.model("bert", num_hidden_layers=2), PrefixTuningV2Config())
    model.save_pretrained(tmp_path)
    other = tiny.model("bert", num_hidden_layers=4, hidden_size=16)
    columns = model.base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding["default"].weight.shape[1]
    assert columns == 4 * 2 * 16
    with pytest.raises(ValueError, match=r"encoder 0,1: 4x8\+4x8, while BertModel has encoder 0,1,2,3: 4x4\+4x4"):
        PeftModel.from_pretrained(other, tmp_path)


def test_one_config_for_several_models():
    config = PrefixTuningV2Config()
    for layers in (2, 3):
        model = get_peft_model(tiny.model("bert", num_hidden_layers=layers), config)
        assert model.peft_config["default"] is config and config.prefix_layout is None
    assert config.to_dict()["prefix_layout"] is None


# ---- New words: PEFT saves the embeddings of a resized vocabulary

WORDS = {
    "bert": ("bert", "AutoModelForSequenceClassification", "SEQ_CLS", {}),
    "bert, its own words": ("bert", "AutoModelForMaskedLM", None, {}),
    "llama": ("llama", "AutoModelForCausalLM", "CAUSAL_LM", {}),
    "llama, tied": ("llama", "AutoModelForCausalLM", "CAUSAL_LM", {"tie_word_embeddings": True}),
    "t5": ("t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", {}),
}
NEW = 5


@pytest.fixture
def base(request, tmp_path):
    """Load the same base model at every call, with `words` added to its vocabulary."""
    kind, auto_class, _, changes = WORDS[request.param]
    tiny.model(kind, auto_class, **changes).save_pretrained(tmp_path / "base")

    def load(words=0, seed=0):
        model = getattr(transformers, auto_class).from_pretrained(tmp_path / "base").eval()
        if words:
            torch.manual_seed(seed)
            model.resize_token_embeddings(tiny.VOCAB + words, mean_resizing=False)
        return model

    return load


@torch.no_grad()
def with_new_words(model, kind):
    """The outputs for texts that contain all new words."""
    inputs = inputs_of(kind)
    for position in range(NEW):
        inputs["input_ids"][:, position] = tiny.VOCAB + position
    output = model.eval()(**inputs)
    return output.logits if "logits" in output else output[0]


@pytest.mark.parametrize("trained", [None, "in", "in and out"])
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize(("base", "name"), [(name, name) for name in WORDS], indirect=["base"])
def test_new_words_are_saved_and_loaded(base, name, wrapped_first, trained, tmp_path):
    kind, _, task_type, _ = WORDS[name]
    model = base(0 if wrapped_first else NEW)
    names = {"bert": ["word_embeddings"], "llama": ["embed_tokens", "lm_head"], "t5": ["shared", "lm_head"]}[kind]
    if trained and (wrapped_first or name == "bert, its own words"):
        pytest.skip("PEFT does not resize what it has wrapped, and ties no head to embeddings that it has wrapped")
    heads = {None: None, "in": names[:1], "in and out": names}[trained]
    model = draw(get_peft_model(model, config(task_type=task_type, modules_to_save=heads)))
    if wrapped_first:
        model.get_base_model().resize_token_embeddings(tiny.VOCAB + NEW)
    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, *(model.get_output_embeddings() or model).parameters()}:
            if parameter.shape[0] == tiny.VOCAB + NEW:
                parameter[tiny.VOCAB :] = torch.randn_like(parameter[tiny.VOCAB :])
    expected = with_new_words(model, kind)
    model.save_pretrained(tmp_path / "adapter")

    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base(NEW, 9), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(with_new_words(loaded, kind), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "adapter" / WEIGHTS).keys()
    # Into an adapter that the model has, as `Trainer` loads its best checkpoint and resumes.
    resumed = get_peft_model(base(NEW, 9), config(task_type=task_type, modules_to_save=heads and list(heads)))
    resumed.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(with_new_words(resumed, kind), expected)

    fresh_base = base()
    before = {key: tensor.clone() for key, tensor in fresh_base.state_dict().items()}
    words = r"vocabulary had been resized: .* has 104 rows, and the base model's has 99. Call `resize_token_embeddings"
    with pytest.raises(ValueError, match=words if not trained else "shape|resized"):
        PeftModel.from_pretrained(fresh_base, tmp_path / "adapter")
    assert before.keys() == fresh_base.state_dict().keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in fresh_base.state_dict().items())


@pytest.mark.parametrize(("base", "name"), [("bert", "bert"), ("llama, tied", "llama, tied")], indirect=["base"])
def test_embeddings_that_are_saved_on_request(base, name, tmp_path):
    kind, _, task_type, _ = WORDS[name]
    model = draw(get_peft_model(base(), config(task_type=task_type)))
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    expected = answers(model, kind)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert torch.equal(answers(PeftModel.from_pretrained(base(), tmp_path / "adapter"), kind), expected)
    fold_source = draw(get_peft_model(base(), config(True, task_type=task_type)))
    with torch.no_grad():
        fold_source.get_input_embeddings().weight[7] += 1
    fold_source.save_pretrained(tmp_path / "mlp", save_embedding_layers=True)
    fold(tmp_path / "mlp", tmp_path / "folded")
    folded = PeftModel.from_pretrained(base(), tmp_path / "folded")
    assert torch.allclose(answers(folded, kind), answers(fold_source, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_embeddings_of_a_second_adapter_may_not_change_those_of_the_first(base, tmp_path):
    model = draw(get_peft_model(base(NEW, 1), config(task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "one")
    own = draw(get_peft_model(base(NEW, 1), config(task_type="SEQ_CLS")), seed=6)
    expected = with_new_words(own, "bert")
    own.save_pretrained(tmp_path / "same")
    get_peft_model(base(NEW, 2), config(task_type="SEQ_CLS")).save_pretrained(tmp_path / "other")
    first = with_new_words(model, "bert")
    with pytest.raises(ValueError, match="would change the embeddings that the other adapters of this model use"):
        model.load_adapter(tmp_path / "other", "other")
    assert list(model.peft_config) == ["default"] and torch.equal(with_new_words(model, "bert"), first)
    model.load_adapter(tmp_path / "same", "same")
    assert torch.equal(with_new_words(model, "bert"), first)
    model.set_adapter("same")
    assert torch.equal(with_new_words(model, "bert"), expected)

    pool = prefix_adapter.AdapterPool(base(NEW, 1))
    with pytest.raises(ValueError, match="would change the embeddings that all adapters of the pool use"):
        pool.load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`resize_token_embeddings\(104\)`"):
        prefix_adapter.AdapterPool(base()).load(tmp_path / "same")
    inputs = inputs_of("bert")["input_ids"].clamp(max=tiny.VOCAB + NEW - 1)
    logits = pool([tmp_path / "same", tmp_path / "one"], input_ids=inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(input_ids=inputs).logits[0])


@pytest.mark.parametrize("base", ["bert"], indirect=True)
@pytest.mark.parametrize("name", ["original_module.", "modules_to_save.", "base_layer."])
def test_only_the_embeddings_that_peft_reads_are_allowed(base, name, tmp_path):
    get_peft_model(base(NEW), config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    full = "base_model.model.bert.embeddings.word_embeddings."
    save_file({**weights, f"{full}{name}weight": weights[f"{full}weight"].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"word_embeddings.*which is no part of the adapter"):
        PeftModel.from_pretrained(base(NEW), tmp_path)


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_embeddings_are_put_back_when_loading_fails(base, tmp_path, monkeypatch):
    get_peft_model(base(NEW, 1), config(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    model = base(NEW, 2)
    expected = with_new_words(model, "bert")
    set_state = peft.peft_model.set_peft_model_state_dict

    def interrupted(*args, **kwargs):
        set_state(*args, **kwargs)
        raise KeyboardInterrupt

    for low_cpu_mem_usage in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(peft.peft_model, "set_peft_model_state_dict", interrupted)
            PeftModel.from_pretrained(model, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        with pytest.warns(UserWarning, match="was removed"):
            assert torch.equal(with_new_words(model, "bert"), expected)


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_new_words_with_trainer(base, tmp_path):
    """The best checkpoint and the last one have the embeddings of the new words."""

    def trainer(model, load_best_model_at_end=True):
        rows = [{"input_ids": [tiny.VOCAB + row % NEW, 7, 8 + row], "labels": row % 3} for row in range(8)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=load_best_model_at_end, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            learning_rate=0.1, disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    def wrap(seed):
        model = get_peft_model(base(NEW, seed), config(task_type="SEQ_CLS"))
        model.get_input_embeddings().weight.requires_grad_(True)
        return model

    first = trainer(wrap(1))
    first.train()
    best = PeftModel.from_pretrained(base(NEW, 9), first.state.best_model_checkpoint)
    assert torch.equal(with_new_words(first.model, "bert"), with_new_words(best, "bert"))
    last = PeftModel.from_pretrained(base(NEW, 9), tmp_path / "run" / "checkpoint-4")
    resumed = trainer(wrap(3), load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert torch.equal(with_new_words(resumed.model, "bert"), with_new_words(last, "bert"))
    assert differ(with_new_words(last, "bert"), with_new_words(wrap(3), "bert"))


@pytest.mark.parametrize(("base", "name"), [("bert", "bert"), ("llama", "llama")], indirect=["base"])
def test_new_words_by_auto_classes(base, name, tmp_path):
    """The tokenizer beside the adapter gives the number of words. Without it the error names the solution."""
    kind, auto_class, task_type, _ = WORDS[name]
    model = draw(get_peft_model(base(NEW, 1), config(task_type=task_type)))
    expected = with_new_words(model, kind)
    model.save_pretrained(tmp_path / "adapter")
    auto = getattr(peft, auto_class.replace("AutoModel", "AutoPeftModel"))
    with pytest.raises(ValueError, match=r"Call `resize_token_embeddings\(104\)`"):
        auto.from_pretrained(tmp_path / "adapter")
    words = {f"word{index}": index for index in range(tiny.VOCAB + NEW - 1)} | {"[UNK]": tiny.VOCAB + NEW - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "adapter")
    assert torch.equal(with_new_words(auto.from_pretrained(tmp_path / "adapter"), kind), expected)
