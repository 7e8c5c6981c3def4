"""Exchange with P-tuning-v2's checkpoints and with PEFT's prefix tuning: the same outputs, or a refusal."""

import json
import os
import resource
import tracemalloc
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import reference
import tiny
import torch
import transformers as tr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefix_adapter import (
    PrefixTuningV2Config,
    UnsupportedBackboneError,
    export_peft,
    fold,
    get_peft_model,
    import_peft,
    import_ptuning_v2,
)
from prefix_adapter.adapters import exchange
from prefix_adapter.cli import main
from prefix_adapter.files.pickled import read_state_dict

N, WIDTH, LABELS = 4, 24, 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight"
AUTO = {
    "SEQ_CLS": tr.AutoModelForSequenceClassification,
    "TOKEN_CLS": tr.AutoModelForTokenClassification,
    "QUESTION_ANS": tr.AutoModelForQuestionAnswering,
    "MULTIPLE_CHOICE": tr.AutoModelForMultipleChoice,
    "CAUSAL_LM": tr.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": tr.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": tr.AutoModel,
}
SMALL = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE = {
    "opt": lambda: tr.OPTConfig(**SMALL, word_embed_proj_dim=tiny.HIDDEN, ffn_dim=48, pad_token_id=0, init_std=0.2),
    "bloom": lambda: tr.BloomConfig(**SMALL, pad_token_id=0, initializer_range=0.2),
    "mistral": lambda: tr.MistralConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=48, pad_token_id=0, initializer_range=0.2, sliding_window=8
    ),
    "deberta": lambda: tr.DebertaConfig(**SMALL, intermediate_size=48),
    "deberta-v2": lambda: tr.DebertaV2Config(
        **SMALL,
        intermediate_size=48,
        initializer_range=0.2,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        max_relative_positions=16,
        max_position_embeddings=tiny.LENGTH,
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=0,
    ),
}
# PEFT warns about token types and names of base models, transformers about tiny models.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _more_kinds(monkeypatch):
    monkeypatch.setattr(tiny, "CONFIGS", {**tiny.CONFIGS, **MORE})


# ---- Helpers


def save_base(folder: Path, kind: str, auto_class: str | None = None, **changes) -> str:
    """The folder of a tiny model, as it would be downloaded."""
    if auto_class is None:
        auto_class = "AutoModelForSeq2SeqLM" if kind in ("t5", "bart") else "AutoModelForCausalLM"
        if kind in ("bert", "roberta", "deberta", "deberta-v2"):
            auto_class = "AutoModel"
    if kind == "t5":
        # With the factor 5 of `tiny`, a change of 1e-7 in the weights changes the logits by 1e-3.
        changes = {"initializer_factor": 1.0, **changes}
    tiny.model(kind, auto_class, **changes).save_pretrained(folder)
    return str(folder)


def load_base(base: str, task: str):
    labels = {"SEQ_CLS": LABELS, "TOKEN_CLS": LABELS, "QUESTION_ANS": 2}
    torch.manual_seed(9)  # what the checkpoint lacks is drawn
    return AUTO[task].from_pretrained(base, **({"num_labels": labels[task]} if task in labels else {})).eval()


def load(base: str, task: str, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_base(base, task), str(adapter)).eval()


def draw(module: nn.Module, seed: int = 2) -> None:
    """Draw the trained parameters anew, so that the prefix and the head have a large effect."""
    tiny.randomize(module, seed=seed)


def inputs_of(task: str, kind: str, side: str | None = "right") -> dict[str, Tensor]:
    """A batch whose second row is padded."""
    ids, mask = tiny.ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    if side is not None:
        mask[1, slice(4, None) if side == "right" else slice(3)] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, tiny.config(kind).pad_token_id), "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = tiny.ids(2, 5, seed=4)
    return inputs


@torch.no_grad()
def answers(model: nn.Module, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """The logits or hidden states, without those of padding."""
    own = isinstance(model, PeftModel) and model.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
    output = reference.output_of_peft(model, **inputs) if own else model(**inputs)
    if task == "QUESTION_ANS":
        found = torch.stack([output.start_logits, output.end_logits], dim=-1)
    else:
        found = output.logits if "logits" in output else output.last_hidden_state
    if task in ("TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION"):
        return found[inputs["attention_mask"].bool()]
    return found


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def assert_differ(one: Tensor, other: Tensor) -> None:
    """Assert that two outputs differ so much that a test for equality could fail."""
    assert (one - other).abs().max() > 1e-2


def config_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def change(folder: Path, **changes) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **changes}))


def assert_same_files(one: Path, other: Path) -> None:
    left, right = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- P-tuning-v2, after model/*.py of THUDM/P-tuning-v2


def ptuning_weights(base: str, kind: str, task: str, projection: bool) -> dict[str, Tensor]:
    """The state dict of its trainer: the whole model, for three of the tasks with the pooler."""
    backbone = tr.AutoModel.from_pretrained(base).state_dict()
    pooled = task in ("SEQ_CLS", "MULTIPLE_CHOICE")
    root = kind.partition("-")[0]
    weights = {f"{root}.{key}": tensor for key, tensor in backbone.items() if pooled or "pooler" not in key}
    weights[f"{root}.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)  # saved by older versions
    generator = torch.Generator().manual_seed(3)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    hidden, columns = tiny.HIDDEN, tiny.LAYERS * 2 * tiny.HIDDEN
    head, labels = {"QUESTION_ANS": ("qa_outputs", 2), "MULTIPLE_CHOICE": ("classifier", 1)}.get(
        task, ("classifier", LABELS)
    )
    weights |= {f"{head}.weight": new(labels, hidden), f"{head}.bias": new(labels)}
    if not projection:
        return weights | {"prefix_encoder.embedding.weight": new(N, columns)}
    return weights | {
        "prefix_encoder.embedding.weight": new(N, hidden),
        "prefix_encoder.trans.0.weight": new(WIDTH, hidden),
        "prefix_encoder.trans.0.bias": new(WIDTH),
        "prefix_encoder.trans.2.weight": new(columns, WIDTH),
        "prefix_encoder.trans.2.bias": new(columns),
    }


def ptuning_settings(base: str, kind: str, task: str, projection: bool) -> dict:
    model = {
        "SEQ_CLS": "PrefixForSequenceClassification",
        "TOKEN_CLS": "PrefixForTokenClassification",
        "QUESTION_ANS": "PrefixForQuestionAnswering" if kind == "bert" else "PrefixModelForQuestionAnswering",
        "MULTIPLE_CHOICE": "PrefixForMultipleChoice",
    }[task]
    return {
        "_name_or_path": base,
        "architectures": [kind.title().replace("-", "") + model],
        "model_type": kind,
        "pre_seq_len": N,
        "prefix_projection": projection,
        "prefix_hidden_size": WIDTH,
        "hidden_dropout_prob": 0.25,
    }


def save_ptuning(folder: Path, base: str, kind: str, task: str, projection: bool = False) -> dict[str, Tensor]:
    folder.mkdir()
    weights = ptuning_weights(base, kind, task, projection)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(ptuning_settings(base, kind, task, projection)))
    return weights


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def ptuning(
    kind: str, task: str, weights: dict[str, Tensor], inputs: dict[str, Tensor], shift: int = N, prefix: bool = True
) -> Tensor:
    """Its logits: the prefix before every layer, the input's positions behind it, its own heads."""
    table = weights["prefix_encoder.embedding.weight"]
    if "prefix_encoder.trans.0.weight" in weights:
        table = linear(weights, "prefix_encoder.trans.2", torch.tanh(linear(weights, "prefix_encoder.trans.0", table)))
    ids, mask = (inputs[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))
    if kind == "deberta-v2":
        states = reference.deberta_v2(tiny.config(kind), weights, ids, mask, table if prefix else None, shift)
        return linear(weights, "classifier", states)[inputs["attention_mask"].bool()]
    # `reference.py` also computes transformers' head. It gets zeros here, because its logits are not used.
    square, flat = torch.zeros(tiny.HIDDEN, tiny.HIDDEN), torch.zeros(tiny.HIDDEN)
    names = ("bert.pooler.dense", "classifier", "classifier.dense", "classifier.out_proj")
    others = {f"{name}.{part}": tensor for name in names for part, tensor in (("weight", square), ("bias", flat))}
    states, _ = reference.encoder(
        kind, tiny.config(kind), {**others, **weights}, ids, mask, table if prefix else None, shift
    )
    if task in ("SEQ_CLS", "MULTIPLE_CHOICE"):
        states = torch.tanh(linear(weights, f"{kind}.pooler.dense", states[:, 0]))
    logits = linear(weights, "qa_outputs" if task == "QUESTION_ANS" else "classifier", states)
    if task == "MULTIPLE_CHOICE":
        return logits.view(inputs["input_ids"].shape[:2])
    return logits if task == "SEQ_CLS" else logits[inputs["attention_mask"].bool()]


def ptuning_inputs(kind: str, task: str) -> dict[str, Tensor]:
    inputs = inputs_of(task, kind)
    if task == "MULTIPLE_CHOICE":
        return {name: tensor.unsqueeze(0).repeat(2, 1, 1) for name, tensor in inputs.items()}
    return inputs


def check_ptuning(base: str, kind: str, task: str, weights: dict[str, Tensor], adapter: Path) -> None:
    inputs = ptuning_inputs(kind, task)
    expected = ptuning(kind, task, weights, inputs)
    assert_equal(answers(load(base, task, adapter), task, inputs), expected)
    assert_differ(expected, ptuning(kind, task, weights, inputs, prefix=False, shift=0))
    assert_differ(expected, ptuning(kind, task, weights, inputs, shift=0))


@pytest.mark.parametrize("projection", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_ptuning_v2(kind, task, projection, tmp_path):
    base = save_base(tmp_path / "base", kind)
    weights = save_ptuning(tmp_path / "run", base, kind, task, projection)
    assert import_ptuning_v2(tmp_path / "run", tmp_path / "adapter") == tmp_path / "adapter"
    check_ptuning(base, kind, task, weights, tmp_path / "adapter")

    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.num_virtual_tokens) == (base, N)
    assert (config.prefix_projection, config.encoder_hidden_size) == (projection, WIDTH if projection else None)
    assert config.shift_positions and config.prefix_dropout == 0.25
    assert config.prefix_layout == "encoder 0,1,2: 4x8+4x8"
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert torch.equal(saved[KEY], weights["prefix_encoder.embedding.weight"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG, "README.md"}


def test_ptuning_v2_trains_on(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    save_ptuning(tmp_path / "run", base, "bert", "TOKEN_CLS", projection=True)
    import_ptuning_v2(tmp_path / "run", tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base(base, "TOKEN_CLS"), str(tmp_path / "adapter"), is_trainable=True)
    model(**inputs_of("TOKEN_CLS", "bert"), labels=torch.zeros(2, 7, dtype=torch.long)).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 5 + 2 and all(parameter.grad.any() for parameter in trained.values())


@pytest.mark.parametrize("form", ["file", "safetensors", "parts"])
def test_ptuning_v2_without_its_config(form, tmp_path):
    base = save_base(tmp_path / "base", "bert")
    weights = ptuning_weights(base, "bert", "TOKEN_CLS", False)
    source = tmp_path / "model.safetensors"
    if form == "safetensors":
        save_file(weights, source)
        source = tmp_path
    else:
        source = tmp_path / "checkpoint.bin"
        backbone = {} if form == "parts" else weights
        torch.save({key: t for key, t in weights.items() if not key.startswith("bert.") or key in backbone}, source)
    with pytest.raises(ValueError, match=r"`task_type`: .* Choose out of"):
        import_ptuning_v2(source, tmp_path / "adapter", base)
    with pytest.raises(ValueError, match=r"`base_model`: .* does not say which model was frozen"):
        import_ptuning_v2(source, tmp_path / "adapter", task_type="TOKEN_CLS")
    import_ptuning_v2(source, tmp_path / "adapter", base, "TOKEN_CLS")
    check_ptuning(base, "bert", "TOKEN_CLS", weights, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["prefix_dropout"] == PrefixTuningV2Config().prefix_dropout


@pytest.mark.parametrize("kind, task", [("bert", "SEQ_CLS"), ("roberta", "MULTIPLE_CHOICE")])
def test_ptuning_v2_keeps_a_pooler_that_the_base_does_not_have(kind, task, tmp_path):
    base = save_base(tmp_path / "base", kind, "AutoModelForMaskedLM")
    weights = save_ptuning(tmp_path / "run", base, kind, task)
    import_ptuning_v2(tmp_path / "run", tmp_path / "adapter")
    assert "pooler" in config_of(tmp_path / "adapter")["modules_to_save"]
    check_ptuning(base, kind, task, weights, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_ptuning_v2_prefix_alone(kind, tmp_path):
    base = save_base(tmp_path / "base", kind)
    weights = save_ptuning(tmp_path / "run", base, kind, "TOKEN_CLS", projection=True)
    import_ptuning_v2(tmp_path / "run", tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    assert all(".prefix_tuning_v2." in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    inputs = inputs_of("TOKEN_CLS", kind)
    states = answers(load(base, "FEATURE_EXTRACTION", tmp_path / "adapter"), "FEATURE_EXTRACTION", inputs)
    assert_equal(linear(weights, "classifier", states), ptuning(kind, "TOKEN_CLS", weights, inputs))


class Anything:
    """A class that no pickle of tensors needs."""


def break_ptuning(weights: dict, what: str) -> None:
    embedding = "prefix_encoder.embedding.weight"
    if what == "columns":
        weights[embedding] = weights[embedding][:, :-1].clone()
    elif what == "not finite":
        weights[embedding][1, 2] = torch.nan
    elif what == "no prefix":
        del weights[embedding]
    elif what == "no head":
        del weights["classifier.weight"], weights["classifier.bias"]
    elif what == "half an MLP":
        weights["prefix_encoder.trans.0.weight"] = torch.zeros(WIDTH, tiny.HIDDEN)
    elif what == "MLP of other shapes":
        sizes = {"trans.0.weight": (WIDTH, 16), "trans.0.bias": (WIDTH,), "trans.2.weight": (192, WIDTH)}
        sizes |= {"trans.2.bias": (192,), "embedding.weight": (N, 16)}
        weights |= {f"prefix_encoder.{name}": torch.zeros(size) for name, size in sizes.items()}
    elif what == "prompt":
        weights["prefix_encoder.weight"] = weights.pop(embedding)[:, : tiny.HIDDEN].clone()
    elif what == "unknown":
        weights["adapter.weight"] = torch.zeros(2)
    elif what == "other base":
        weights["bert.encoder.layer.1.output.dense.weight"] += 1e-3
    elif what == "dimensions":
        weights[embedding] = weights[embedding].flatten()
    elif what == "pickle":
        weights["extra"] = Anything()
    elif what == "no state dict":
        weights["epoch"] = 3


@pytest.mark.parametrize(
    "what, words",
    [
        ("columns", r"embedding\.weight has the shape \[4, 191\] where \[4, 192\] is needed"),
        ("not finite", r"not finite, in prefix_encoder\.embedding\.weight"),
        ("no prefix", "no checkpoint of P-tuning-v2's prefix"),
        ("no head", r"Neither .*run nor .*base has classifier\.bias, classifier\.weight"),
        ("half an MLP", "an MLP has .* and a table its embedding.weight alone"),
        ("MLP of other shapes", r"embedding\.weight has the shape \[4, 16\] where \[4, 32\] is needed"),
        ("prompt", "embeddings in front of the input, not a prefix of each layer"),
        ("unknown", r"it has .*adapter\.weight, which is no part"),
        ("other base", r"another base model than .*1 of its tensors differ, bert\.encoder\.layer\.1\.output"),
        ("dimensions", "has 1 dimensions"),
        ("pickle", "cannot be read: damaged, .*objects other than tensors"),
        ("no state dict", "is no state dict"),
    ],
)
def test_ptuning_v2_refuses(what, words, tmp_path):
    base = save_base(tmp_path / "base", "bert")
    weights = save_ptuning(tmp_path / "run", base, "bert", "TOKEN_CLS")
    break_ptuning(weights, what)
    torch.save(weights, tmp_path / "run" / "pytorch_model.bin")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        import_ptuning_v2(tmp_path / "run", tmp_path / "adapter")
    assert sorted(tmp_path.rglob("*")) == before


def test_ptuning_v2_refuses_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        import_ptuning_v2(tmp_path, tmp_path / "adapter", "bert-base-cased", "SEQ_CLS")
    with pytest.raises(ValueError, match=r"There is no file .*missing\.bin"):
        import_ptuning_v2(tmp_path / "missing.bin", tmp_path / "adapter", "bert-base-cased", "SEQ_CLS")
    for name in ("model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"neither zip nor pickle nor safetensors")
        with pytest.raises(ValueError, match=rf"{name} (cannot be read: damaged|is damaged)"):
            import_ptuning_v2(tmp_path / name, tmp_path / "adapter", "bert-base-cased", "SEQ_CLS")
    with pytest.raises(FileExistsError, match="exists"):
        import_ptuning_v2(tmp_path / "missing.bin", tmp_path)


# ---- Files of a stranger

EMBEDDING = "prefix_encoder.embedding.weight"


class Makes:
    """Is pickled as a call with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def rewrite(path: Path, change, compression=zipfile.ZIP_STORED) -> None:
    """Change the records of an archive of `torch.save`, and write it again."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name.rpartition("/")[2], data))


def repeated(path: Path) -> None:
    torch.save({EMBEDDING: torch.zeros(1).expand(10**5, 30_000)}, path)


def overlong(path: Path) -> None:
    torch.save({EMBEDDING: torch.zeros(4, 192)}, path)
    size = (768).to_bytes(2, "little")
    rewrite(path, lambda name, data: data.replace(b"M" + size, b"J" + (2**31 - 1).to_bytes(4, "little")))


def compressed(path: Path) -> None:
    torch.save({EMBEDDING: torch.zeros(1000, 1000)}, path)
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def opcode(data: bytes):
    """Put opcodes in front of a pickle. Their results are dropped."""

    def make(path: Path) -> None:
        torch.save({EMBEDDING: torch.zeros(4, 192)}, path)
        rewrite(path, lambda name, old: old[:2] + data + b"0" + old[2:] if name == "data.pkl" else old)

    return make


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(4, 192), 1.0, 0, torch.qint8)


HOSTILE = {
    "one number repeated": (repeated, f"{EMBEDDING} would have 3,000,000,000 numbers, and the file has 1 for it"),
    "more than there is": (overlong, "storage '?0'? does not have the 2,147,483,647 numbers"),
    "compressed": (compressed, "its records are compressed"),
    "an array of bytes": (
        lambda path: torch.save({EMBEDDING: Makes(bytearray, 10**10)}, path),
        r"names \w+\.bytearray, which is no part of a tensor",
    ),
    "a tensor of a size": (
        lambda path: torch.save({EMBEDDING: Makes(torch.Tensor, 10**5, 10**5)}, path),
        rf"{EMBEDDING} is not a dense tensor of a usual dtype \(torch\.Tensor\)",
    ),
    "a function": (lambda path: torch.save({EMBEDDING: Makes(os.system, "true")}, path), "names posix.system"),
    "a place in the memo": (opcode(b"N" + b"r" + b"\xff" * 4), "its pickle has LONG_BINPUT"),
    "bytes of a length": (opcode(b"\x96" + (10**12).to_bytes(8, "little")), "cannot be read|BYTEARRAY8"),
    "meta": (lambda path: torch.save({EMBEDDING: torch.zeros(4, 192, device="meta")}, path), "is not a dense tensor"),
    "sparse": (lambda path: torch.save({EMBEDDING: torch.eye(4).to_sparse()}, path), "is not a dense tensor"),
    "quantised": (lambda path: torch.save({EMBEDDING: quantised()}, path), "is not a dense tensor"),
    "8 bits": (
        lambda path: torch.save({EMBEDDING: torch.zeros(4, 192).to(torch.float8_e4m3fn)}, path),
        "is not a dense tensor",
    ),
    "complex": (lambda path: torch.save({EMBEDDING: torch.zeros(4, dtype=torch.cfloat)}, path), "is not a dense"),
    "a list": (lambda path: torch.save([torch.zeros(4)], path), "is no state dict"),
    "a number": (lambda path: torch.save({EMBEDDING: 3}, path), f"is no state dict: {EMBEDDING} is no tensor"),
    "other keys": (lambda path: torch.save({3: torch.zeros(4)}, path), "is no state dict"),
    "before 1.6": (
        lambda path: torch.save({EMBEDDING: torch.zeros(4)}, path, _use_new_zipfile_serialization=False),
        "cannot be read: .*PyTorch 1.6",
    ),
    "a pipe": (os.mkfifo, "There is no file"),
    "escapes": (
        lambda path: torch.save({EMBEDDING: torch.zeros(4, 192), "\x1b[2Jgone": torch.eye(2).to_sparse()}, path),
        r"\\x1b\[2Jgone is not a dense tensor",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_ptuning_v2_of_a_stranger(name, tmp_path):
    """The error names the file and the tensor, and comes before any memory is allocated."""
    make, words = HOSTILE[name]
    path = tmp_path / "x.bin"
    try:
        make(path)
    except ModuleNotFoundError as error:
        # pickle searches all modules for a name. This makes lazy modules of older transformers import others.
        pytest.skip(f"torch.save cannot make the file here: {error}")
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words) as error:
        import_ptuning_v2(path, tmp_path / "adapter", "no/base", "TOKEN_CLS")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_ptuning_v2_safetensors_of_a_stranger(dtype, tmp_path):
    save_file({EMBEDDING: torch.zeros(4, 192).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {EMBEDDING} has the dtype"):
        import_ptuning_v2(tmp_path, tmp_path / "adapter", "no/base", "TOKEN_CLS")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "config.json is damaged: it is no JSON"),
        (b"\xff\xfe", "config.json is damaged: it is no JSON"),
        (b"[]", "config.json is damaged: it holds no JSON object"),
        (b"[" * 10**5, "config.json is damaged: it is no JSON"),
        (b'{"architectures": 3}', "config.json: `architectures` is 3"),
        (b'{"_name_or_path": ["x"]}', "config.json: `_name_or_path` is"),
        (b'{"hidden_dropout_prob": "\\u001b[2J"}', r"config.json: `hidden_dropout_prob` is .*x1b\[2J"),
    ],
    ids=str,
)
def test_ptuning_v2_with_a_damaged_config(text, words, tmp_path):
    torch.save({EMBEDDING: torch.zeros(4, 192)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=words) as error:
        import_ptuning_v2(tmp_path, tmp_path / "adapter")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_ptuning_v2_reads_what_torch_reads(dtype, tmp_path):
    """Views, shared storages, parameters, buffers of integers, and the `_metadata` of a module's state dict."""
    module = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.BatchNorm1d(4)}).to(dtype)
    weights = module.state_dict()
    weights["view"] = torch.arange(12.0).view(3, 4).T[1:]
    weights["one"] = weights["other"] = nn.Parameter(torch.ones(2))
    weights["none"], weights["scalar"] = torch.zeros(0, 3), torch.tensor(3)
    torch.save(weights, tmp_path / "x.bin")
    read = read_state_dict(tmp_path / "x.bin")
    assert list(read) == list(weights)
    assert all(torch.equal(read[name], weights[name]) and read[name].dtype == weights[name].dtype for name in read)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@example(place=0.5078125, change=b"", cut=1, in_pickle=True)  # another object instead of the storage
@example(place=0.53125, change=b"", cut=1, in_pickle=True)  # a number instead of the sizes
@given(
    place=st.floats(0, 1),
    change=st.binary(max_size=6),
    cut=st.integers(0, 6),
    in_pickle=st.booleans(),
)
def test_ptuning_v2_of_any_bytes(place, change, cut, in_pickle, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "x.bin"
    torch.save({EMBEDDING: torch.ones(2, 6), "other": torch.ones(3).to(torch.int64)}, path)

    def mutate(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + change + data[at + cut :]

    if in_pickle:
        rewrite(path, lambda name, data: mutate(data) if name == "data.pkl" else data)
    else:
        path.write_bytes(mutate(path.read_bytes()))
    try:
        weights = read_state_dict(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(tensor, Tensor) and tensor.numel() <= 100 for tensor in weights.values())


def test_ptuning_v2_refuses_half_of_a_roberta_head(tmp_path):
    base = save_base(tmp_path / "base", "roberta")
    weights = ptuning_weights(base, "roberta", "SEQ_CLS", False)
    torch.save({key: t for key, t in weights.items() if "pooler" not in key}, tmp_path / "run.bin")
    with pytest.raises(ValueError, match="reads the backbone's pooler, and that is not in the file"):
        import_ptuning_v2(tmp_path / "run.bin", tmp_path / "adapter", base, "SEQ_CLS")


def test_ptuning_v2_of_another_model_with_as_many_columns(tmp_path):
    base = save_base(tmp_path / "base", "roberta")
    save_ptuning(tmp_path / "run", save_base(tmp_path / "bert", "bert"), "bert", "TOKEN_CLS")
    with pytest.raises(ValueError, match=r"another base model than .*RobertaModel has no bert\.embeddings"):
        import_ptuning_v2(tmp_path / "run", tmp_path / "adapter", base, "FEATURE_EXTRACTION")


DEBERTA_V2 = {
    "table": (False, {}),
    "mlp": (True, {"share_att_key": False}),
    "positions": (False, {"position_biased_input": True}),
    "convolution": (False, {"conv_kernel_size": 3, "conv_act": "tanh"}),
}


@pytest.mark.parametrize("case", DEBERTA_V2)
def test_ptuning_v2_of_deberta_v2(case, tmp_path, monkeypatch):
    """It has this model for tokens only."""
    kind, task, (projection, changes) = "deberta-v2", "TOKEN_CLS", DEBERTA_V2[case]
    monkeypatch.setitem(tiny.CONFIGS, kind, lambda: tr.DebertaV2Config(**{**MORE[kind]().to_dict(), **changes}))
    base = save_base(tmp_path / "base", kind)
    weights = save_ptuning(tmp_path / "run", base, kind, task, projection)
    import_ptuning_v2(tmp_path / "run", tmp_path / "adapter")
    config, shifts = config_of(tmp_path / "adapter"), "position_biased_input" in changes
    assert (config["entry_point"], config["shift_positions"]) == ("attention", shifts)
    # The convolution sees padding there, which transformers sets to zero.
    inputs = inputs_of(task, kind, None if case == "convolution" else "right")
    expected = ptuning(kind, task, weights, inputs)
    assert_equal(answers(load(base, task, tmp_path / "adapter"), task, inputs), expected)
    assert_differ(expected, ptuning(kind, task, weights, inputs, prefix=False))
    if shifts:
        assert_differ(expected, ptuning(kind, task, weights, inputs, shift=0))


def test_ptuning_v2_refuses_deberta(tmp_path):
    base = save_base(tmp_path / "base", "deberta")
    torch.save(ptuning_weights(base, "deberta", "TOKEN_CLS", False), tmp_path / "run.bin")
    with pytest.raises(UnsupportedBackboneError, match="DebertaForTokenClassification cannot take a prefix"):
        import_ptuning_v2(tmp_path / "run.bin", tmp_path / "adapter", base, "TOKEN_CLS")


# ---- PEFT


def save_peft(folder: Path, base: str, task: str, **settings) -> PeftModel:
    """Save an adapter of PEFT whose prefix and head have a large effect."""
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N, **settings)
    model = peft.get_peft_model(load_base(base, task), config).eval()
    draw(model)
    model.save_pretrained(folder)
    return model


def save_ours(folder: Path, base: str, task: str | None, auto: str | None = None, **settings) -> PeftModel:
    settings = {"num_virtual_tokens": N, "shift_positions": True, **settings}
    model = get_peft_model(load_base(base, auto or task), PrefixTuningV2Config(task_type=task, **settings)).eval()
    draw(model)
    model.save_pretrained(folder)
    return model


BOTH_WAYS = [
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "FEATURE_EXTRACTION"),
    ("roberta", "SEQ_CLS"),
    ("roberta", "TOKEN_CLS"),
    ("gpt2", "CAUSAL_LM"),
    ("gpt2", "SEQ_CLS"),
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("opt", "CAUSAL_LM"),
    ("bloom", "CAUSAL_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
]


def check_same(base: str, kind: str, task: str, one: Path, other: Path) -> None:
    """Assert that two adapters give the same outputs, with and without padding, and the base model others."""
    models = [load(base, task, folder) for folder in (one, other)]
    sides = (None, "right", "left") if task == "CAUSAL_LM" else (None, "right")
    for side in sides:
        inputs = inputs_of(task, kind, side)
        left, right = (answers(model, task, inputs) for model in models)
        assert_equal(left, right)
    if task != "FEATURE_EXTRACTION":  # PEFT drops the token types of this task
        assert_differ(right, answers(load_base(base, task), task, inputs))


def generated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of each step of greedy search."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return torch.stack(model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True).logits)


@reference.needs_peft_to_run
@pytest.mark.parametrize("kind, task", [pair for pair in BOTH_WAYS if pair[1] in ("CAUSAL_LM", "SEQ_2_SEQ_LM")])
def test_peft_generates_the_same(kind, task, tmp_path):
    base = save_base(tmp_path / "base", kind)
    save_peft(tmp_path / "peft", base, task)
    import_peft(tmp_path / "peft", tmp_path / "ours")
    inputs = inputs_of("CAUSAL_LM", kind, "left" if task == "CAUSAL_LM" else "right")
    theirs, ours = (generated(load(base, task, tmp_path / name), inputs) for name in ("peft", "ours"))
    assert_equal(ours, theirs)
    assert_differ(theirs, generated(load_base(base, task), inputs))


def test_peft_that_does_not_run_gives_a_warning(tmp_path):
    """The check passes PEFT's keys and values to the backbone. PEFT's own forward, where it works, does the same."""
    base = save_base(tmp_path / "base", "bert")
    model = save_peft(tmp_path / "peft", base, "SEQ_CLS")
    runs = reference.PEFT_RUNS
    with nullcontext() if runs else pytest.warns(UserWarning, match="a prefix of PEFT fails there"):
        import_peft(tmp_path / "peft", tmp_path / "ours")
    with exchange._prompt_in_backbone(model):
        given = exchange._compute_outputs(model.get_base_model(), "SEQ_CLS")["logits"]
    assert_equal(given, exchange._compute_outputs(load(base, "SEQ_CLS", tmp_path / "ours"), "SEQ_CLS")["logits"])
    if runs:
        assert_equal(given, exchange._compute_outputs(model, "SEQ_CLS")["logits"])


@pytest.mark.parametrize("kind, task", BOTH_WAYS)
def test_peft_and_back(kind, task, tmp_path):
    base = save_base(tmp_path / "base", kind)
    save_peft(tmp_path / "peft", base, task)
    assert import_peft(tmp_path / "peft", tmp_path / "ours") == tmp_path / "ours"
    assert config_of(tmp_path / "ours")["peft_type"] == "PREFIX_TUNING_V2"
    check_same(base, kind, task, tmp_path / "peft", tmp_path / "ours")
    assert export_peft(tmp_path / "ours", tmp_path / "back") == tmp_path / "back"
    assert_same_files(tmp_path / "peft", tmp_path / "back")
    one, other = config_of(tmp_path / "peft"), config_of(tmp_path / "back")
    for config in (one, other):
        config["modules_to_save"] = set(config["modules_to_save"] or ())
    assert one == other


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("kind, task", [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_cartridge_and_back(kind, task, frozen, tmp_path):
    base = save_base(tmp_path / "base", kind)
    settings = peft.CartridgeConfig(task_type=task, num_virtual_tokens=N, num_frozen_tokens=frozen)
    # Its own start, N(0, 1), has a large effect already. Frozen tokens keep it.
    model = peft.get_peft_model(load_base(base, task), settings).eval()
    draw(model)
    model.save_pretrained(tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "ours")
    assert config_of(tmp_path / "ours")["num_frozen_tokens"] == frozen
    check_same(base, kind, task, tmp_path / "peft", tmp_path / "ours")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--peft_type", "CARTRIDGE"])
    assert_same_files(tmp_path / "peft", tmp_path / "back")
    one, other = config_of(tmp_path / "peft"), config_of(tmp_path / "back")
    for config in (one, other):
        config["modules_to_save"] = set(config["modules_to_save"] or ())
    assert one == other
    export_peft(tmp_path / "ours", tmp_path / "prefix")
    check_same(base, kind, task, tmp_path / "prefix", tmp_path / "ours")


def test_cartridge_refused(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    settings = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_frozen_tokens=N)
    peft.get_peft_model(load_base(base, "CAUSAL_LM"), settings).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="no token could be trained"):
        import_peft(tmp_path / "peft", tmp_path / "no")
    save_ours(tmp_path / "ours", base, "CAUSAL_LM", shift_positions=False)
    with pytest.raises(ValueError, match="train with `shift_positions=True`"):
        export_peft(tmp_path / "ours", tmp_path / "no", peft_type="CARTRIDGE")
    with pytest.raises(ValueError, match="`peft_type` must be one of"):
        export_peft(tmp_path / "ours", tmp_path / "no", peft_type="LORA")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("projection", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize("kind, task", [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
def test_ours_and_back(kind, task, projection, tmp_path):
    base = save_base(tmp_path / "base", kind)
    settings = {"target_attention": ["decoder"]} if task == "SEQ_2_SEQ_LM" else {}
    save_ours(tmp_path / "ours", base, task, prefix_projection=projection, **settings)
    export_peft(tmp_path / "ours", tmp_path / "peft")
    assert config_of(tmp_path / "peft")["peft_type"] == "PREFIX_TUNING"
    for folder in ("ours", "peft"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "More Information Needed" not in card and str(tmp_path) not in card and "`num_virtual_tokens`" in card
    check_same(base, kind, task, tmp_path / "ours", tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "back")
    table = tmp_path / "ours"
    if projection:
        table = fold(table, tmp_path / "folded")
    assert_same_files(tmp_path / "back", table)
    config = {**config_of(tmp_path / "back"), "prefix_dropout": PrefixTuningV2Config.prefix_dropout}
    assert config == config_of(table)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_peft_ties_the_layers_of_an_even_decoder(kind, tmp_path):
    layers = {"num_layers": 4, "num_decoder_layers": 4} if kind == "t5" else {"encoder_layers": 4, "decoder_layers": 4}
    base = save_base(tmp_path / "base", kind, **layers)
    save_peft(tmp_path / "peft", base, "SEQ_2_SEQ_LM")
    import_peft(tmp_path / "peft", tmp_path / "ours")
    check_same(base, kind, "SEQ_2_SEQ_LM", tmp_path / "peft", tmp_path / "ours")
    table = load_file(tmp_path / "ours" / WEIGHTS)[KEY].chunk(4, dim=1)
    assert torch.equal(table[0], table[2]) and torch.equal(table[1], table[3])
    export_peft(tmp_path / "ours", tmp_path / "back")
    check_same(base, kind, "SEQ_2_SEQ_LM", tmp_path / "back", tmp_path / "ours")
    save_ours(tmp_path / "free", base, "SEQ_2_SEQ_LM", target_attention=["decoder"])
    with pytest.raises(ValueError, match="PEFT gives layers 0 and 2 of a decoder of 4 layers the same prefix"):
        export_peft(tmp_path / "free", tmp_path / "no")


def test_peft_projection_is_a_table(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    model = save_peft(tmp_path / "peft", base, "SEQ_CLS", prefix_projection=True, encoder_hidden_size=WIDTH)
    import_peft(tmp_path / "peft", tmp_path / "ours")
    assert config_of(tmp_path / "ours")["prefix_projection"] is False
    inputs = inputs_of("SEQ_CLS", "bert")
    assert_equal(
        answers(load(base, "SEQ_CLS", tmp_path / "ours"), "SEQ_CLS", inputs), answers(model, "SEQ_CLS", inputs)
    )


def test_base_model_in_another_folder(tmp_path):
    """The files keep the name of the base model that the adapter was trained with."""
    base = save_base(tmp_path / "base", "bert")
    save_peft(tmp_path / "peft", base, "SEQ_CLS")
    change(tmp_path / "peft", base_model_name_or_path="someone/bert")
    import_peft(tmp_path / "peft", tmp_path / "ours", base)
    export_peft(tmp_path / "ours", tmp_path / "back", base)
    assert {config_of(tmp_path / name)["base_model_name_or_path"] for name in ("ours", "back")} == {"someone/bert"}
    change(tmp_path / "peft", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say which model was frozen"):
        import_peft(tmp_path / "peft", tmp_path / "other")


def test_questions_with_token_types(tmp_path):
    """PEFT's model class drops them, so an adapter that was trained with them is rejected."""
    task, head = "QUESTION_ANS", {"modules_to_save": ["qa_outputs"]}
    base = save_base(tmp_path / "base", "bert")
    save_ours(tmp_path / "ours", base, None, task, **head)
    with pytest.raises(ValueError, match="`token_type_ids`, which PEFT's model for question answering drops"):
        export_peft(tmp_path / "ours", tmp_path / "peft")
    base = save_base(tmp_path / "roberta", "roberta", type_vocab_size=1)
    save_ours(tmp_path / "no types", base, None, task, **head)
    export_peft(tmp_path / "no types", tmp_path / "peft")
    check_same(base, "roberta", task, tmp_path / "no types", tmp_path / "peft")


def test_sliding_window_gives_a_warning(tmp_path):
    base = save_base(tmp_path / "base", "mistral")
    save_peft(tmp_path / "peft", base, "CAUSAL_LM")
    for convert, source, target in ((import_peft, "peft", "ours"), (export_peft, "ours", "back")):
        with pytest.warns(UserWarning, match="look back 8 tokens") as record:
            convert(tmp_path / source, tmp_path / target)
        assert any(item.filename == __file__ for item in record)
    models = [load(base, "CAUSAL_LM", tmp_path / name) for name in ("peft", "ours")]
    for length, same in ((8 - N, True), (12, False)):
        inputs = {"input_ids": tiny.ids(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
        left, right = (answers(model, "CAUSAL_LM", inputs) for model in models)
        (assert_equal if same else assert_differ)(left, right)


@pytest.mark.parametrize(
    "kind, task, settings, words",
    [
        ("bert", "SEQ_CLS", {"shift_positions": False}, r"`shift_positions=False`.*train with `shift_positions=True`"),
        ("llama", "CAUSAL_LM", {"shift_positions": False}, "PEFT lets them start after the prefix"),
        ("bert", "SEQ_CLS", {"layers_to_transform": [1]}, r"no prefix in front of layers \[0, 2\]"),
        ("bart", "SEQ_2_SEQ_LM", {}, r"prefix in front of encoder 0,1,2: .*target_attention=\['decoder'\]"),
        ("bert", "MULTIPLE_CHOICE", {"modules_to_save": ["classifier"]}, "no task type .*BertForMultipleChoice"),
        ("bert", "SEQ_CLS", {"entry_point": "attention"}, "`entry_point='attention'`, and PEFT's .* the cache"),
        ("bert", "SEQ_CLS", {"strength": 0.5}, "`strength=0.5`, and PEFT's prefix has no strength"),
    ],
)
def test_export_refuses(kind, task, settings, words, tmp_path):
    base = save_base(tmp_path / "base", kind)
    save_ours(tmp_path / "ours", base, None if task == "MULTIPLE_CHOICE" else task, task, **settings)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        export_peft(tmp_path / "ours", tmp_path / "peft")
    assert sorted(tmp_path.rglob("*")) == before


def break_peft(folder: Path, what: str) -> None:
    weights = load_file(folder / WEIGHTS)
    if what == "columns":
        weights["prompt_embeddings"] = weights["prompt_embeddings"][:, :-2].clone()
    elif what == "layers":
        change(folder, num_layers=2)
        weights["prompt_embeddings"] = weights["prompt_embeddings"][:, : 2 * 64].clone()
    elif what == "not finite":
        weights["prompt_embeddings"][0, 0] = torch.inf
    elif what == "no prefix":
        del weights["prompt_embeddings"]
    elif what == "no head":
        del weights["base_model.classifier.weight"]
    elif what == "unknown":
        weights["base_model.bert.embeddings.word_embeddings.weight2"] = torch.zeros(3)
    elif what == "head of another width":
        weights["base_model.classifier.weight"] = torch.zeros(LABELS, 5)
    elif what == "no task":
        change(folder, task_type=None)
    save_file(weights, folder / WEIGHTS)
    if what == "damaged":
        (folder / WEIGHTS).write_bytes(b"no safetensors")


@pytest.mark.parametrize(
    "what, words",
    [
        ("columns", r"prompt_embeddings is \(4, 190\), while its own configuration says \(4, 192\)"),
        ("layers", "PEFT's own prefix tuning fails on the base model|does not fit"),
        ("not finite", "has NaN or Inf in prompt_embeddings"),
        ("no prefix", "has no prompt_embeddings"),
        ("no head", r"Neither .*peft nor .*base has classifier\.weight"),
        ("unknown", r"word_embeddings\.weight2, which is no part"),
        (
            "head of another width",
            r"does not fit BertForSequenceClassification .*classifier\.weight has the shape \[3, 5\]",
        ),
        ("no task", "has no task type that PEFT knows"),
        ("damaged", "is damaged"),
    ],
)
def test_import_refuses(what, words, tmp_path):
    base = save_base(tmp_path / "base", "bert")
    save_peft(tmp_path / "peft", base, "SEQ_CLS")
    break_peft(tmp_path / "peft", what)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        import_peft(tmp_path / "peft", tmp_path / "ours")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_outputs_are_refused(tmp_path, monkeypatch):
    """Both adapters are run before anything is written, so an unknown difference of PEFT's is an error."""
    base = save_base(tmp_path / "base", "gpt2")
    save_peft(tmp_path / "peft", base, "CAUSAL_LM")
    import_peft(tmp_path / "peft", tmp_path / "ours")
    get_prompt = PeftModel.get_prompt

    def otherwise(self, *args, **kwargs):
        cache = get_prompt(self, *args, **kwargs)
        cache.layers[1].values += 0.01
        return cache

    monkeypatch.setattr(PeftModel, "get_prompt", otherwise)
    before = sorted(tmp_path.rglob("*"))
    for convert, source in ((import_peft, "peft"), (export_peft, "ours")):
        with pytest.raises(ValueError, match="PEFT's prefix tuning computes other logits than this package, by"):
            convert(tmp_path / source, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_t5_for_feature_extraction(tmp_path):
    """PEFT passes one cache for the decoder's self-attention and its cross-attention."""
    base = save_base(tmp_path / "base", "t5")
    save_peft(tmp_path / "peft", base, "FEATURE_EXTRACTION")
    with pytest.raises(ValueError, match=r"computes other last_hidden_state|PEFT's own prefix tuning fails"):
        import_peft(tmp_path / "peft", tmp_path / "ours")


def test_a_base_without_a_pooler(tmp_path):
    """The pooler is random at each loading. A bare backbone works without it, a head that reads it does not."""
    base = save_base(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    save_peft(tmp_path / "peft", base, "FEATURE_EXTRACTION")
    import_peft(tmp_path / "peft", tmp_path / "ours")
    check_same(base, "bert", "FEATURE_EXTRACTION", tmp_path / "peft", tmp_path / "ours")
    save_peft(tmp_path / "head", base, "SEQ_CLS")
    with pytest.raises(ValueError, match=r"Neither .*head nor .*base has bert\.pooler\.dense\.bias, "):
        import_peft(tmp_path / "head", tmp_path / "no")


def test_the_other_method_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    save_peft(tmp_path / "peft", base, "SEQ_CLS")
    save_ours(tmp_path / "ours", base, "SEQ_CLS")
    with pytest.raises(ValueError, match="ours is a PREFIX_TUNING_V2 adapter, not one of PREFIX_TUNING or CARTRIDGE"):
        import_peft(tmp_path / "ours", tmp_path / "new")
    with pytest.raises(ValueError, match="peft is a PREFIX_TUNING adapter, not one of PREFIX_TUNING_V2"):
        export_peft(tmp_path / "peft", tmp_path / "new")
    for convert, source in ((import_peft, "peft"), (export_peft, "ours")):
        with pytest.raises(FileExistsError, match="exists"):
            convert(tmp_path / source, tmp_path / "base")


def test_missing_weights_are_an_error(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    save_ours(tmp_path / "ours", base, "SEQ_CLS")
    weights = load_file(tmp_path / "ours" / WEIGHTS)
    save_file({key: tensor for key, tensor in weights.items() if key != KEY}, tmp_path / "ours" / WEIGHTS)
    with pytest.raises((ValueError, RuntimeError), match="embedding"):
        export_peft(tmp_path / "ours", tmp_path / "peft")


# ---- The command


def test_command(tmp_path, capsys):
    base = save_base(tmp_path / "base", "bert")
    weights = save_ptuning(tmp_path / "run", base, "bert", "TOKEN_CLS", projection=True)
    file = tmp_path / "run" / "pytorch_model.bin"
    places = [str(tmp_path / name) for name in ("one", "two", "peft", "back")]
    main(["import", str(tmp_path / "run"), places[0]])
    main(["import", str(file), places[1], "--model", base, "--task_type", "TOKEN_CLS"])
    for place in places[:2]:
        check_ptuning(base, "bert", "TOKEN_CLS", weights, Path(place))
    main(["export", places[0], places[2]])
    main(["import", places[2], places[3]])
    check_ptuning(base, "bert", "TOKEN_CLS", weights, Path(places[3]))
    out = capsys.readouterr().out
    assert f"Imported into {places[0]}." in out and f"Exported to {places[2]}." in out

    for arguments, words in (
        (["import", places[2], str(tmp_path / "x"), "--task_type", "SEQ_CLS"], "prefix-adapter import: --task_type"),
        (["import", str(tmp_path), str(tmp_path / "x")], "prefix-adapter import: .*has no model.safetensors"),
        (["export", places[2], str(tmp_path / "x")], "prefix-adapter export: .*not one of PREFIX_TUNING_V2"),
        (["export", places[0], places[2]], "prefix-adapter export: .*exists"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(arguments)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_suffices(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"\n  prefix-adapter {command} " in out and "--model" in out


def test_export_with_new_words(tmp_path):
    """PEFT saves the embeddings of a resized vocabulary. The converted adapter needs a base model that has them."""
    base = save_base(tmp_path / "base", "llama")
    resized = load_base(base, "CAUSAL_LM")
    words = resized.get_input_embeddings().weight.shape[0] + 5
    resized.resize_token_embeddings(words)
    model = get_peft_model(
        resized, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=4, shift_positions=True)
    )
    draw(model)
    model.save_pretrained(tmp_path / "ours")
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "ours" / WEIGHTS)
    with pytest.raises(ValueError, match=r"embeddings of its own \(model.embed_tokens.weight, lm_head.weight\)"):
        export_peft(tmp_path / "ours", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    model.unload().save_pretrained(tmp_path / "resized")
    export_peft(tmp_path / "ours", tmp_path / "peft", str(tmp_path / "resized"))
    assert set(load_file(tmp_path / "peft" / WEIGHTS)) == {"prompt_embeddings"}
