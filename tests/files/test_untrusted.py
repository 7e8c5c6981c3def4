"""Adapters of strangers: damaged and hostile files are rejected, and the model stays unchanged.

`PREFIX_ADAPTER_FUZZ=5000` draws this number of random examples, instead of a few that are always the same.
"""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupt import Steps
from packaging import version
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.integrations.peft import MIN_PEFT_VERSION

from prefix_adapter import AdapterPool, PrefixTuningV2Config, export_peft, fold, import_peft
from prefix_adapter.adapters.saved import describe_adapter
from prefix_adapter.cli import main

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
KEY = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_"
HEAD = "base_model.model.classifier.weight"
TESTS = Path(__file__).parents[1]
KINDS = {
    "bert": ("AutoModelForSequenceClassification", {"task_type": "SEQ_CLS"}),
    "bert mlp": ("AutoModelForSequenceClassification", {"task_type": "SEQ_CLS", "prefix_projection": True}),
    "llama": ("AutoModelForCausalLM", {"task_type": "CAUSAL_LM"}),
}

pytestmark = pytest.mark.filterwarnings("ignore")


def fresh(kind):
    return tiny.model(kind.split()[0], KINDS[kind][0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Good adapters, each in a folder."""
    folders = {}
    for kind, (_, config) in KINDS.items():
        model = get_peft_model(fresh(kind), PrefixTuningV2Config(num_virtual_tokens=4, **config))
        tiny.randomize(model)
        folders[kind] = tmp_path_factory.mktemp("good") / kind.replace(" ", "-")
        model.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the good adapter of a BERT, to be damaged."""
    return Path(shutil.copytree(saved["bert"], tmp_path / "adapter"))


# ---- The ways in which an adapter is loaded


def wrapped(kind):
    model = get_peft_model(fresh(kind), PrefixTuningV2Config(num_virtual_tokens=3, **KINDS[kind][1]), "first")
    tiny.randomize(model, seed=5)
    return model


def native(kind):
    model = fresh(kind)
    model.add_adapter(PrefixTuningV2Config(num_virtual_tokens=3), "first")
    tiny.randomize(model, seed=5)
    return model.eval()  # without dropout


WAYS = {
    "PeftModel": (fresh, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "PeftModel, with its config": (
        fresh,
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder)),
    ),
    "PeftModel, without memory": (
        fresh,
        lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True, low_cpu_mem_usage=True),
    ),
    "beside another": (wrapped, lambda model, folder: model.load_adapter(folder, "other") and model),
    "transformers": (fresh, lambda model, folder: model.load_adapter(str(folder)) and model),
    "transformers, beside another": (
        native,
        lambda model, folder: model.load_adapter(str(folder), "other", is_trainable=True) and model,
    ),
}


# transformers 5.24 needs a PEFT that is not released yet.
NATIVE = version.parse(peft.__version__) >= version.parse(MIN_PEFT_VERSION)
LOADERS = {way: how for way, how in WAYS.items() if NATIVE or "transformers" not in way}


def needs_transformers(way="transformers", heads=True):
    if "transformers" in way and not NATIVE:
        pytest.skip(f"transformers' own load_adapter asks for PEFT {MIN_PEFT_VERSION}")
    if "transformers" in way and heads and version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip("transformers' own load_adapter reads no task heads before 5.18")


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny.ids()).logits


def state_of(model):
    """All state of a model that an adapter could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")
    inner = getattr(model, "base_model", model)
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "hooks": [[list(getattr(module, name)) for name in hooks] for module in model.modules()],
        "methods": [sorted(vars(module)) for module in model.modules()],
        "parameters": [(name, id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        "values": [p.detach().clone() for p in model.state_dict().values()],
        "training": [module.training for module in model.modules()],
        "active": [getattr(module, "_active_adapter", None) for module in model.modules()],
        "configs": [list(getattr(part, "peft_config", ()) or ()) for part in (model, inner)],
        "native": getattr(model, "_hf_peft_config_loaded", None),
    }


def assert_unchanged(model, before, outputs, when=""):
    after = state_of(model)
    for name in before:
        if name == "values":
            assert all(torch.equal(old, new) for old, new in zip(before[name], after[name], strict=True))
        else:
            assert before[name] == after[name], (name, when)
    # In training mode dropout makes outputs random.
    if not any(module.training for module in model.modules()):
        assert torch.equal(logits(model), outputs)


def refuse(folder, words="", kind="bert", ways=LOADERS, errors=ValueError):
    """Assert that each way to load it raises this error, and that the model stays unchanged."""
    for make, load in ways.values():
        for training in (False, True):
            model = make(kind).train(training)
            before, outputs = state_of(model), logits(model)
            with pytest.raises(errors, match=words):
                load(model, folder)
            assert_unchanged(model, before, outputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_good_adapters_are_loaded(kind, way, saved):
    needs_transformers(way, heads=kind != "llama")
    make, load = WAYS[way]
    model = make(kind)
    outputs = logits(model)
    loaded = load(model, saved[kind])
    loaded.set_adapter("other" if "beside" in way else "default")
    expected = logits(PeftModel.from_pretrained(fresh(kind), saved[kind]))
    assert torch.equal(logits(loaded.eval()), expected) and not torch.equal(expected, outputs)


# ---- Files


def edit(folder, **changes):
    """Change the tensors of a file."""
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        full = HEAD if name == "head" else KEY + name.replace("__", ".")
        tensors[full] = change(tensors[full])
    save_file(tensors, folder / WEIGHTS)


def add(folder, name, tensor):
    save_file({**load_file(folder / WEIGHTS), name: tensor}, folder / WEIGHTS)


def reconfigure(folder, /, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:length])


def header(folder, change):
    """Replace the header by another text of the right length."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    text = change(data[8:end])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def value(number):
    def change(tensor):
        tensor.view(-1)[-1] = number
        return tensor

    return change


def drop(folder, name):
    save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k != name}, folder / WEIGHTS)


def replace_file(folder, make):
    (folder / WEIGHTS).unlink()
    make(folder / WEIGHTS)


def deep(folder):
    header(folder, lambda text: b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


E = "embedding__weight"
DAMAGED = {
    "empty": (lambda f: cut(f, 0), "damaged"),
    "a length alone": (lambda f: cut(f, 8), "damaged"),
    "half a length": (lambda f: cut(f, 5), "damaged"),
    "half a header": (lambda f: cut(f, 60), "damaged"),
    "one byte short": (lambda f: cut(f, -1), "damaged"),
    "half": (lambda f: cut(f, 1500), "damaged"),
    "more behind": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"), "damaged"),
    "huge header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "its header would have"),
    "zip": (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(500)), "damaged"),
    "page": (lambda f: (f / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>not found</html>"), "damaged"),
    "pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "damaged"),
    "no JSON": (lambda f: header(f, lambda text: text.replace(b"{", b"[")), "damaged"),
    "deep": (deep, "damaged"),
    "negative shape": (lambda f: header(f, lambda text: text.replace(b"[4,192]", b"[-4,-192]")), "damaged"),
    "huge shape": (lambda f: header(f, lambda text: text.replace(b"[4,192]", b"[4,9223372036854775807]")), "damaged"),
    "other dtype in the header": (lambda f: header(f, lambda text: text.replace(b'"F32"', b'"F99"')), "damaged"),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), "it lacks .*classifier"),
    "renamed": (lambda f: header(f, lambda text: text.replace(b"embedding", b"enbedding")), "it lacks .*embedding"),
    "no prefix": (lambda f: drop(f, KEY + "embedding.weight"), "it lacks .*embedding"),
    "no head": (lambda f: drop(f, HEAD), "it lacks .*classifier.weight"),
    "more tensors": (lambda f: add(f, KEY + "extra.weight", torch.ones(1)), "extra.weight, which is no part"),
    "a weight of the base": (
        lambda f: add(f, "base_model.model.bert.embeddings.position_embeddings.weight", torch.ones(64, 32)),
        "position_embeddings.weight, which is no part",
    ),
    "an MLP": (lambda f: add(f, KEY + "hidden.weight", torch.ones(8, 32)), "hidden.weight, which is no part"),
    "rows": (lambda f: edit(f, **{E: lambda t: t[:3].clone()}), r"shape \[3, 192\] where \[4, 192\]"),
    "columns": (lambda f: edit(f, **{E: lambda t: t[:, :128].clone()}), r"shape \[4, 128\] where \[4, 192\]"),
    "flat": (lambda f: edit(f, **{E: lambda t: t.flatten()}), r"shape \[768\] where"),
    "turned": (lambda f: edit(f, **{E: lambda t: t.T.contiguous()}), r"shape \[192, 4\] where"),
    "zero-sized": (lambda f: edit(f, **{E: lambda t: t[:0].clone()}), r"shape \[0, 192\] where"),
    "labels": (lambda f: edit(f, head=lambda t: torch.ones(5, 32)), r"shape \[5, 32\] where.*num_labels"),
    "NaN": (lambda f: edit(f, **{E: value(torch.nan)}), "NaN or Inf in .*embedding"),
    "Inf": (lambda f: edit(f, **{E: value(-torch.inf)}), "NaN or Inf in .*embedding"),
    "NaN in the head": (lambda f: edit(f, head=value(torch.nan)), "NaN or Inf in .*classifier"),
    "half a NaN": (lambda f: edit(f, **{E: lambda t: value(torch.nan)(t.half())}), "NaN or Inf in .*embedding"),
    "double": (lambda f: edit(f, **{E: lambda t: value(1e300)(t.double())}), "too large for torch.float32"),
    **{
        str(dtype): (lambda f, dtype=dtype: edit(f, **{E: lambda t: t.to(dtype)}), "embedding.*dtype")
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "none": (lambda f: replace_file(f, lambda _: None), "has a config, but no"),
    "a link to nothing": (lambda f: replace_file(f, lambda path: path.symlink_to("nothing")), "has a config, but no"),
    "a folder": (lambda f: replace_file(f, lambda path: path.mkdir()), "not a file"),
    "a pipe": (lambda f: replace_file(f, os.mkfifo), "not a file"),
    "a link to a device": (lambda f: replace_file(f, lambda path: path.symlink_to("/dev/zero")), "not a file"),
    "a pickle": (lambda f: replace_file(f, lambda _: torch.save({}, f / PICKLE)), "pickle"),
    "no numbers": (lambda f: reconfigure(f, num_virtual_tokens="4"), "num_virtual_tokens"),
    "other length": (lambda f: reconfigure(f, num_virtual_tokens=5), r"\[4, 192\] where \[5, 192\]"),
    "other layers": (lambda f: reconfigure(f, layers_to_transform=[0], prefix_layout=None), r"where \[4, 64\]"),
    "other method": (lambda f: reconfigure(f, prefix_projection=True), "it lacks .*hidden"),
    "other layout": (lambda f: reconfigure(f, prefix_layout="x" * 10**5), "xxx"),
    "huge": (lambda f: reconfigure(f, num_virtual_tokens=2**31 - 1), "parameters, more than"),
    "huge MLP": (
        lambda f: reconfigure(f, prefix_projection=True, encoder_hidden_size=2**31 - 1),
        "parameters, more than",
    ),
    "huger": (lambda f: reconfigure(f, num_virtual_tokens=10**30), "num_virtual_tokens"),
    "all modules": (lambda f: reconfigure(f, modules_to_save=["r"]), "modules_to_save"),
    "the prefix's modules": (lambda f: reconfigure(f, modules_to_save=["embedding"]), "the adapter itself"),
    "the backbone": (lambda f: reconfigure(f, modules_to_save=["encoder"]), "whose attention gets a prefix"),
    "no modules": (lambda f: reconfigure(f, modules_to_save=[""]), "modules_to_save"),
    "one within another": (lambda f: reconfigure(f, modules_to_save=["pooler", "dense"]), "modules_to_save|it lacks"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), ""),
    "config is binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_bad_adapters_are_refused(name, folder):
    damage, words = DAMAGED[name]
    damage(folder)
    refuse(folder, f"(?s){words}")


# ---- Other ways


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"PREFIX_TUNING_V2"', "{}", '{"peft_type": "NEW"}', '{"peft_type": []}', "[" * 10**5]
)
def test_config_without_a_known_method(text, folder):
    """PEFT reads the type first. The errors are its own, and come before the model changes."""
    (folder / CONFIG).write_text(text)
    refuse(folder, errors=(KeyError, TypeError, ValueError, RecursionError))


@pytest.mark.parametrize("name", ["self", "cls"])
def test_a_key_that_is_an_argument_of_every_method(name, folder):
    reconfigure(folder, **{name: 1})
    refuse(folder, "damaged", ways={"PeftModel": WAYS["PeftModel"], "beside another": WAYS["beside another"]})


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "NEW", ["SEQ_CLS"], 3])
def test_another_task(task_type, folder):
    drop(folder, HEAD)
    drop(folder, HEAD.replace("weight", "bias"))
    reconfigure(folder, task_type=task_type, modules_to_save=None)
    words = {"TOKEN_CLS": "it lacks .*classifier", "NEW": "task type"}.get(str(task_type), "(?i)task.type")
    refuse(folder, words, ways={"PeftModel": WAYS["PeftModel"]})


def test_a_base_of_another_kind(saved):
    for kind, other in (("bert", "llama"), ("llama", "bert")):
        refuse(saved[kind], "another shape|no part|it lacks|generate", kind=other)


def test_auto_classes(folder, tmp_path):
    needs_transformers()
    fresh("bert").save_pretrained(tmp_path / "base")
    reconfigure(folder, base_model_name_or_path=str(tmp_path / "base"))
    auto = "AutoModelForSequenceClassification"
    load = [getattr(transformers, auto).from_pretrained, peft.AutoPeftModelForSequenceClassification.from_pretrained]
    expected = logits(PeftModel.from_pretrained(fresh("bert"), folder))
    assert all(torch.equal(logits(from_pretrained(folder)), expected) for from_pretrained in load)
    edit(folder, head=value(torch.nan))
    for from_pretrained in load:
        with pytest.raises(ValueError, match=r"NaN or Inf in .*classifier"):
            from_pretrained(folder)


def test_subfolder(folder):
    edit(folder, head=value(torch.nan))
    model = fresh("bert")
    before, outputs = state_of(model), logits(model)
    with pytest.raises(ValueError, match="NaN or Inf"):
        PeftModel.from_pretrained(model, folder.parent, subfolder=folder.name)
    # transformers below 5.18 looks for the config in the parent folder.
    with pytest.raises(ValueError, match=r"NaN or Inf|adapter model file not found"):
        model.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name})
    assert_unchanged(model, before, outputs)


@pytest.mark.parametrize("form", ["good", "NaN", "pickle", "none"])
def test_from_the_hub(form, folder, tmp_path):
    """A downloaded adapter in the Hub's cache."""
    if form == "NaN":
        edit(folder, head=value(torch.nan))
    if form == "pickle":
        replace_file(folder, lambda _: torch.save({}, folder / PICKLE))
    if form == "none":
        (folder / WEIGHTS).unlink()
    repository, commit = tmp_path / "cache" / "models--user--adapter", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model, kwargs = fresh("bert"), {"cache_dir": str(tmp_path / "cache")}
    if form == "good":
        assert logits(PeftModel.from_pretrained(model, "user/adapter", **kwargs)).isfinite().all()
        return
    before, outputs = state_of(model), logits(model)
    for load in (
        lambda: PeftModel.from_pretrained(model, "user/adapter", **kwargs),
        lambda: model.load_adapter("user/adapter", adapter_kwargs=kwargs),
    ):
        with pytest.raises(OSError if form == "none" else ValueError, match="" if form == "none" else form):
            load()
        assert_unchanged(model, before, outputs)


def test_loading_into_an_existing_adapter(folder):
    """`Trainer` resumes without a config. The tensors are compared with the adapter in the model."""
    model = PeftModel.from_pretrained(fresh("bert"), folder, is_trainable=True).eval()
    tiny.randomize(model, seed=7)
    before, outputs = state_of(model), logits(model)
    for damage in (
        "NaN",
        "NaN in the head",
        "rows",
        "more tensors",
        "no prefix",
        "a weight of the base",
        "torch.int64",
    ):
        damaged = Path(shutil.copytree(folder, folder.parent / damage))
        DAMAGED[damage][0](damaged)
        with pytest.raises(ValueError, match="(?s)" + DAMAGED[damage][1].replace("weight,", "weight.*")):
            model.load_adapter(damaged, "default")
        assert_unchanged(model, before, outputs)
    model.load_adapter(folder, "default", is_trainable=True)
    assert not torch.equal(logits(model), outputs)


def test_tensors_in_memory(folder):
    model = PeftModel.from_pretrained(fresh("bert"), folder)
    before, outputs = state_of(model), logits(model)
    with pytest.raises(ValueError, match="NaN or Inf"):
        set_peft_model_state_dict(model, {k: v * torch.nan for k, v in load_file(folder / WEIGHTS).items()})
    assert_unchanged(model, before, outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_other_precisions_are_cast(dtype, way, folder):
    needs_transformers(way)
    make, load = WAYS[way]
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor.float() for name, tensor in rounded.items()}, folder / WEIGHTS)
    expected = logits(PeftModel.from_pretrained(fresh("bert"), folder))
    save_file(rounded, folder / WEIGHTS)
    loaded = load(make("bert"), folder)
    loaded.set_adapter("other" if "beside" in way else "default")
    heads = [
        m for name, m in loaded.eval().named_modules() if name.endswith(("modules_to_save.other", "save.default"))
    ]
    for head in heads:
        # Some ways to load leave a head in the precision of its file, for each PEFT method.
        head.float()
    assert torch.equal(logits(loaded), expected)


# ---- Loading that fails after the adapter was put into the model


@pytest.mark.parametrize("way", WAYS)
def test_loading_is_all_or_nothing(way, folder):
    """An error or a Ctrl-C at any step leaves the model unchanged, and the adapter can be loaded afterwards."""
    needs_transformers(way)
    make, load = WAYS[way]
    expected = logits(PeftModel.from_pretrained(fresh("bert"), folder))
    with Steps() as steps:
        load(make("bert").eval(), folder)
    for at in steps.points(12):
        model = make("bert").eval()
        before, outputs = state_of(model), logits(model)
        with Steps(at) as interrupted:
            try:
                load(model, folder)
            except KeyboardInterrupt:
                pass
            else:
                continue
        assert torch.equal(logits(model), outputs), interrupted.where
        assert_unchanged(model, before, outputs, interrupted.where)
        loaded = load(model, folder)
        loaded.set_adapter("other" if "beside" in way else "default")
        assert torch.equal(logits(loaded.eval()), expected), interrupted.where


FAILS = {
    "no permission": (PermissionError, lambda path: PermissionError(13, "Permission denied", str(path))),
    "interrupted": (KeyboardInterrupt, lambda path: KeyboardInterrupt()),
}


@pytest.mark.parametrize("fails", [*FAILS, "swapped"])
def test_file_that_cannot_be_read_after_the_check(fails, folder, monkeypatch):
    read = peft.peft_model.load_peft_weights
    good = (folder / WEIGHTS).read_bytes()

    def between(*args, **kwargs):
        if fails == "swapped":
            edit(folder, head=value(torch.nan))
            return read(*args, **kwargs)
        raise FAILS[fails][1](folder)

    for make in (fresh, wrapped):
        model = make("bert").eval()
        before, outputs = state_of(model), logits(model)
        with monkeypatch.context() as patch, pytest.raises(FAILS.get(fails, (ValueError,))[0]):
            patch.setattr(peft.peft_model, "load_peft_weights", between)
            if make is fresh:
                PeftModel.from_pretrained(model, folder)
            else:
                model.load_adapter(folder, "other")
        (folder / WEIGHTS).write_bytes(good)
        if make is wrapped:
            with pytest.raises(ValueError, match="'other' cannot be saved: loading it failed"):
                model.save_pretrained(folder.parent / "saved")
        with pytest.warns(UserWarning, match=f"was removed: its weights were never read from {folder}"):
            assert torch.equal(logits(model), outputs)
        assert_unchanged(model, before, outputs)


def test_another_thread_goes_on_while_an_adapter_is_loaded(folder, monkeypatch):
    """Other threads neither use nor remove an adapter that is being loaded."""
    model = wrapped("bert").eval()
    outputs, read, seen = logits(model), peft.peft_model.load_peft_weights, []

    def slow(*args, **kwargs):
        thread = threading.Thread(target=lambda: seen.append(logits(model)))
        thread.start()
        thread.join()
        return read(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", slow)
    model.load_adapter(folder, "other")
    assert torch.equal(seen[0], outputs)
    model.set_adapter("other")
    assert torch.equal(logits(model.eval()), logits(PeftModel.from_pretrained(fresh("bert"), folder)))


# ---- Names of modules


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["base_model"], "also means the whole model"),
        (["model"], "also means the whole model"),
        (["forward"], r"names 'forward', and no module of BertForSequenceClassification has a name that ends so"),
        (["config"], "names 'config'"),
        (["clasifier"], "Similar names are classifier"),
        (["classifier", "poolr"], "names 'poolr'.*Similar names are.* pooler"),
    ],
    ids=str,
)
def test_modules_to_save_that_are_no_modules(names, words, folder):
    reconfigure(folder, modules_to_save=names)
    refuse(folder, words)
    for task_type in ("SEQ_CLS", None):
        model = fresh("bert")
        before, outputs = state_of(model), logits(model)
        with pytest.raises(ValueError, match=words):
            get_peft_model(model, PrefixTuningV2Config(task_type=task_type, modules_to_save=list(names)))
        assert_unchanged(model, before, outputs)


def test_names_that_peft_adds_need_not_all_match():
    """PEFT names two heads for a task, of which a model has one or none."""
    for task_type, auto_class in (
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("SEQ_CLS", "AutoModel"),
    ):
        for kind in ("bert", "llama"):
            model = get_peft_model(tiny.model(kind, auto_class), PrefixTuningV2Config(task_type=task_type))
            assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}
    with pytest.raises(ValueError, match="names 'score'"):  # the model has the other one
        get_peft_model(fresh("bert"), PrefixTuningV2Config(modules_to_save=["score"]))


# ---- A config alone


def test_a_config_alone_can_be_read_and_used(folder):
    (folder / WEIGHTS).unlink()
    for cls in (PeftConfig, PrefixTuningV2Config):
        config = cls.from_pretrained(folder)
        assert type(config) is PrefixTuningV2Config and config.num_virtual_tokens == 4
        assert logits(get_peft_model(fresh("bert"), config)).isfinite().all()


def test_a_config_that_was_read_makes_new_adapters_too(folder):
    config = PeftConfig.from_pretrained(folder)
    config.num_virtual_tokens = 9
    model = get_peft_model(fresh("bert"), config)
    assert model.base_model.prefix_layer.adapters["default"].length == 9
    other = dataclasses.replace(PeftConfig.from_pretrained(folder), num_virtual_tokens=7)
    model.add_adapter("other", other)
    assert model.base_model.prefix_layer.adapters["other"].length == 7
    # The fields of a loaded adapter, whose folder no longer exists.
    loaded = PeftModel.from_pretrained(fresh("bert"), folder)
    shutil.rmtree(folder)
    model.add_adapter("again", loaded.peft_config["default"])


def test_a_token_is_not_kept_with_a_model(folder):
    config = PeftConfig.from_pretrained(folder, token="hf_secret")
    assert config.source.options == {"token": "hf_secret"}
    assert "hf_secret" not in repr(config) + repr(config.source) + str(config.to_dict())
    assert b"hf_secret" not in pickle.dumps(config) and b"num_virtual_tokens" in pickle.dumps(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", 5), ("modules_to_save", {"a": 1}), ("modules_to_save", [""]), ("target_attention", 5),
        ("target_attention", [[]]), ("layers_to_transform", {}), ("layers_to_transform", [[]]), ("init_std", 10**400),
        ("init_std", 1e300), ("prefix_dropout", 10**400), ("num_virtual_tokens", 2**31), ("inference_mode", "no"),
        ("base_model_name_or_path", {}), ("revision", 3), ("peft_version", []), ("auto_mapping", []),
        ("auto_mapping", {"base_model_class": 3}), ("task_type", {}), ("prefix_layout", 3),
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_a_file(name, value):
    with pytest.raises(ValueError, match=name.replace("task_type", "task type")):
        PrefixTuningV2Config(**{name: value})


def test_messages_are_short(folder):
    reconfigure(folder, layers_to_transform=list(range(10**5)))
    with pytest.raises(ValueError, match="layers_to_transform") as error:
        PeftModel.from_pretrained(fresh("bert"), folder)
    assert len(str(error.value)) < 2000
    with pytest.raises(ValueError, match="twice") as error:
        PrefixTuningV2Config(layers_to_transform=[0] * 10**5)
    assert len(str(error.value)) < 2000


# ---- Memory

ABSURD = """
import json, resource, shutil, struct, sys, warnings
from pathlib import Path
import tiny, torch
from peft import PeftModel, get_peft_model
from prefix_adapter import PrefixTuningV2Config
warnings.simplefilter("ignore")
torch.set_num_threads(1)
good, folder = Path(sys.argv[1]), Path(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
fresh = lambda: tiny.model("bert", "AutoModelForSequenceClassification")
PeftModel.from_pretrained(fresh(), good)(tiny.ids())

def attempt(config, shapes):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if shapes:
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 4 * torch.Size(shape).numel()
            header["base_model.model." + name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with open(folder / "adapter_model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)  # a hole, which takes no room
    before = peak()
    try:
        PeftModel.from_pretrained(fresh(), folder)
    except ValueError as error:
        print(peak() - before, str(error)[:150].replace(chr(10), " "))

table, head = "prefix_tuning_v2.prefix_tuning_v2_embedding.weight", "classifier.weight"
small = {"classifier.weight": [3, 32], "classifier.bias": [3]}
attempt({"num_virtual_tokens": 10**9}, None)
attempt({"num_virtual_tokens": 2**31 - 1, "prefix_projection": True}, None)
attempt({"prefix_projection": True, "encoder_hidden_size": 10**9}, None)
attempt({"num_virtual_tokens": 10**6, "prefix_projection": True, "encoder_hidden_size": 1}, None)
attempt({"num_virtual_tokens": 10**7}, {table: [10**7, 192], **small})
attempt({}, {table: [10**7, 192], **small})
attempt({}, {table: [4, 192], **small, "classifier.weight": [10**8, 32]})
attempt({}, {table: [4, 192], **small, **{f"extra.{i}": [10] for i in range(10**5)}})
attempt({}, {table: [4, 192], **small, **{"x" * 1000 + str(i): [0] for i in range(20_000)}})
attempt({"layers_to_transform": list(range(10**5))}, None)
attempt({"modules_to_save": ["r", "e", "t"]}, None)
"""


def test_absurd_sizes_take_no_memory(saved, tmp_path):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ABSURD, saved["bert"], tmp_path / "absurd"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == 11, done.stdout
    assert all(int(megabytes) < 100 for megabytes, _ in lines), done.stdout


# ---- At random


EXAMPLES = int(os.environ.get("PREFIX_ADAPTER_FUZZ", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
OURS = (ValueError, OSError)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 6)
    | st.integers()
    | st.sampled_from([10**9, 2**31 - 1, 2**63, 10**400])
    | st.floats()
    | st.sampled_from(["", "encoder", "classifier", "r", "SEQ_CLS", "CAUSAL_LM", "default", "\0", "../.."])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(set(PrefixTuningV2Config().to_dict()) - {"peft_type"}))


def outcome(way, kind, folder):
    """Assert that an adapter can be loaded, or that it is rejected and the model stays unchanged."""
    make, load = WAYS[way]
    model = make(kind)
    before, outputs = state_of(model), logits(model)
    try:
        loaded = load(model, folder)
    except OURS as error:
        assert_unchanged(model, before, outputs)
        return error
    loaded.set_adapter("other" if "beside" in way else "default")
    if max(tensor.abs().max() for tensor in load_file(folder / WEIGHTS).values()) < 1e4:
        assert logits(loaded.eval()).isfinite().all()
    return None


@FUZZ
@given(
    changes=st.dictionaries(FIELDS | st.text(max_size=6), JSON, min_size=1, max_size=4),
    way=st.sampled_from(sorted(LOADERS)),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_config(changes, way, kind, saved, tmp_path_factory):
    folder = Path(shutil.copytree(saved[kind], tmp_path_factory.mktemp("any") / "adapter"))
    reconfigure(folder, **changes)
    outcome(way, kind, folder)
    shutil.rmtree(folder)


POSITION = st.floats(0, 1)
MUTATION = st.one_of(
    st.tuples(st.just("cut"), POSITION),
    st.tuples(st.just("flip"), POSITION, st.integers(1, 255)),
    # Most of the file is data, and most errors are in the header.
    st.tuples(st.just("flip"), st.floats(0, 0.15), st.integers(1, 255)),
    st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("splice"), POSITION, POSITION, st.integers(1, 300)),
    st.tuples(st.just("length"), st.integers(0, 2**64 - 1) | st.integers(0, 1000)),
    st.tuples(
        st.just("text"),
        st.sampled_from([b"F32", b"[4,192]", b"192", b"weight", b"embedding", b"data_offsets", b"0", b",", b'"']),
        st.sampled_from(
            [b"F64", b"F16", b"I32", b"BOOL", b"[192,4]", b"[4,-1]", b"1e9", b"-1", b"", b"[", b"18446744073709551615"]
        ),
    ),
)  # fmt: skip


def mutate(data, mutation):
    what, *how = mutation
    place = int(how[0] * len(data)) if isinstance(how[0], float) else 0
    if what == "cut":
        return data[:place]
    if what == "flip":
        return data[:place] + bytes(byte ^ how[1] for byte in data[place : place + 1]) + data[place + 1 :]
    if what == "insert":
        return data[:place] + how[1] + data[place:]
    if what == "splice":
        source = int(how[1] * len(data))
        return data[:place] + data[source : source + how[2]] + data[place + how[2] :]
    if what == "length":
        return struct.pack("<Q", how[0]) + data[8:]
    end = 8 + struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    text = data[8:end].replace(how[0], how[1])
    return struct.pack("<Q", len(text)) + text + data[end:]


@FUZZ
@given(
    mutations=st.lists(MUTATION, min_size=1, max_size=3),
    way=st.sampled_from(sorted(LOADERS)),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_file(mutations, way, kind, saved, tmp_path_factory):
    folder = Path(shutil.copytree(saved[kind], tmp_path_factory.mktemp("any") / "adapter"))
    data = (folder / WEIGHTS).read_bytes()
    for mutation in mutations:
        data = mutate(data, mutation)
    (folder / WEIGHTS).write_bytes(data)
    outcome(way, kind, folder)
    shutil.rmtree(folder)


# ---- Functions that read a folder without PEFT


def pool_load(folder):
    AdapterPool(fresh("bert")).load(folder)


READERS = {
    "info": describe_adapter,
    "fold": lambda folder: fold(folder, folder.parent / "folded"),
    "export": lambda folder: export_peft(folder, folder.parent / "peft", "no/base"),
    "import": lambda folder: import_peft(folder, folder.parent / "ours", "no/base"),
    "pool": pool_load,
    "config": PrefixTuningV2Config.from_pretrained,
}
TEXTS = {
    "nothing": b"",
    "half": b'{"peft_type": "PREFIX_TUNING_V2", ',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 10**5,
    "deep, as a value": b'{"peft_type": "PREFIX_TUNING_V2", "layers_to_transform": ' + b"[" * 500 + b"]" * 500 + b"}",
    "binary": b"\xff\xfe{\x00",
    "a huge number": b'{"peft_type": "PREFIX_TUNING_V2", "num_virtual_tokens": ' + b"9" * 10**4 + b"}",
    "a list as type": b'{"peft_type": []}',
    "no such type": b'{"peft_type": "\\u001b[2JNEW"}',
    "long": b'{"peft_type": "PREFIX_TUNING_V2", "x": "' + b"x" * 10**6 + b'"}',
    "escapes": b'{"peft_type": "PREFIX_TUNING_V2", "prefix_layout": "\\u001b[2J"}',
    "a name with escapes": b'{"peft_type": "PREFIX_TUNING_V2", "base_model_name_or_path": "\\u001b]0;x\\u0007"}',
    "self": b'{"peft_type": "PREFIX_TUNING_V2", "self": 3}',
    "LoRA of nonsense": b'{"peft_type": "LORA", "target_modules": 3, "r": {}, "loftq_config": []}',
}


def assert_named(error, folder):
    text = str(error)
    assert str(folder) in text and text.isprintable() and len(text) < 2000, text


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_config_is_named(name, reader, folder):
    (folder / CONFIG).write_bytes(TEXTS[name])
    if name == "LoRA of nonsense" and reader in ("info", "config"):
        return  # these two use nothing of it
    with pytest.raises(ValueError) as error:
        READERS[reader](folder)
    assert_named(error.value, folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_small_mlp_of_a_huge_table(folder):
    """A file of a few MB would be folded into one of 2 TB."""
    numbers = 2**19
    reconfigure(folder, prefix_projection=True, encoder_hidden_size=1, num_virtual_tokens=numbers)
    parts = {"embedding.weight": (numbers, 1), "hidden.weight": (1, 1), "hidden.bias": (1,)}
    parts |= {"output.weight": (numbers, 1), "output.bias": (numbers,)}
    save_file({KEY + name: torch.zeros(shape) for name, shape in parts.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="the table would have 274,877,906,944 numbers") as error:
        fold(folder, folder.parent / "folded")
    assert_named(error.value, folder)


def test_a_config_without_a_type(folder):
    """A config class raises a TypeError, as PEFT's own do. Functions that read folders name the problem."""
    (folder / CONFIG).write_text('{"foo": "bar"}')
    for cls in (peft.LoraConfig, PrefixTuningV2Config):
        with pytest.raises(TypeError, match=f"{cls.__name__} config .* is missing required keys: {{'peft_type'}}"):
            cls.from_pretrained(folder)
    for reader in set(READERS) - {"config"}:
        with pytest.raises(ValueError, match="`peft_type` is None") as error:
            READERS[reader](folder)
        assert_named(error.value, folder)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a device", "a link to nothing"])
@pytest.mark.parametrize("reader", sorted(set(READERS) - {"config"}))
def test_a_config_that_is_no_file(kind, reader, folder):
    (folder / CONFIG).unlink()
    make = {
        "a pipe": os.mkfifo,
        "a folder": os.mkdir,
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
    }
    make[kind](folder / CONFIG)
    with pytest.raises(ValueError, match=r"is not a file|holds no adapter") as error:
        READERS[reader](folder)
    assert_named(error.value, folder)


def test_control_characters_are_escaped(folder, capsys):
    """The output of `prefix-adapter info` for a stranger's file."""
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "\x1b[2J\x9b1mgone\u202e": torch.ones(1)}, folder / WEIGHTS)
    main(["info", str(folder)])
    assert r"\u001b[2J\u009b1mgone\u202e" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no part of the adapter") as error:
        PeftModel.from_pretrained(fresh("bert"), folder)
    assert_named(error.value, folder)
    get_peft_model(tiny.model("bert"), peft.LoraConfig(target_modules=["query"])).save_pretrained(folder)
    reconfigure(folder, base_model_name_or_path="\x1b[2J", target_modules=["\x1b[3m"], alpha_pattern={"\x07": 1})
    main(["info", str(folder)])
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines()) and r"\x1b[3m" in shown and r"\x07" in shown


@pytest.mark.parametrize("library", ["os", "this", "transformers_of_mine", "subprocess.run"])
def test_a_config_that_names_a_library(library, folder):
    """`AutoPeftModel` imports the library that a config names, if it is on PEFT's list."""
    reconfigure(
        folder, task_type=None, auto_mapping={"base_model_class": "Model", "parent_library": library},
        base_model_name_or_path="no/base",
    )  # fmt: skip
    with pytest.raises(ValueError, match="import"):
        peft.AutoPeftModel.from_pretrained(folder)
    assert "this" not in sys.modules


def test_keys_that_occur_twice(folder):
    """Each reader of the file checks and uses the same value."""
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", '{"num_virtual_tokens": 9,', 1))
    assert PrefixTuningV2Config.from_pretrained(folder).num_virtual_tokens == 4
    assert logits(PeftModel.from_pretrained(fresh("bert"), folder)).isfinite().all()
    (folder / CONFIG).write_text(text[: text.rindex("}")] + ', "num_virtual_tokens": 9}')
    refuse(folder, "shape .4, 192. where .9, 192.")
    (folder / CONFIG).write_text(text)
    expected = logits(PeftModel.from_pretrained(fresh("bert"), folder))
    first = b'{"' + HEAD.encode() + b'":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
    header(folder, lambda text: first + text[1:])
    assert torch.equal(logits(PeftModel.from_pretrained(fresh("bert"), folder)), expected)


def read(reader, folder):
    """Each error of a folder names the folder."""
    try:
        READERS[reader](folder)
    except OURS as error:
        assert_named(error, folder)
    except TypeError as error:
        assert reader == "config" and "peft_type" in str(error)


SLOW = settings(FUZZ, max_examples=EXAMPLES or 40)
LOCAL = st.sampled_from(["info", "fold", "pool", "config"])


@SLOW
@given(
    changes=st.dictionaries(FIELDS | st.text(max_size=6), JSON, min_size=1, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    reader=LOCAL,
)
def test_readers_of_any_config(changes, kind, reader, saved, tmp_path_factory):
    folder = Path(shutil.copytree(saved[kind], tmp_path_factory.mktemp("any") / "adapter"))
    reconfigure(folder, **changes)
    read(reader, folder)
    shutil.rmtree(folder.parent)


@SLOW
@given(mutations=st.lists(MUTATION, min_size=1, max_size=3), name=st.sampled_from([CONFIG, WEIGHTS]), reader=LOCAL)
def test_readers_of_any_bytes(mutations, name, reader, saved, tmp_path_factory):
    folder = Path(shutil.copytree(saved["bert mlp"], tmp_path_factory.mktemp("any") / "adapter"))
    data = (folder / name).read_bytes()
    for mutation in mutations:
        data = mutate(data, mutation)
    (folder / name).write_bytes(data)
    read(reader, folder)
    shutil.rmtree(folder.parent)
