"""AdapterPool: each row of a batch has its own adapter, which is loaded on demand."""

import json
import math
import threading

import peft
import pytest
import tiny
import torch
from interrupt import Steps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from prefix_adapter import AdapterPool, PrefixTuningV2Config

CLASSIFIER, DECODER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
TASKS = {
    "bert": (CLASSIFIER, "SEQ_CLS"),
    "roberta": (CLASSIFIER, "SEQ_CLS"),
    "distilbert": (CLASSIFIER, "SEQ_CLS"),
    "llama": (DECODER, "CAUSAL_LM"),
}
SETTINGS = {
    "short": {"num_virtual_tokens": 2},
    "long": {"num_virtual_tokens": 6, "prefix_projection": True, "encoder_hidden_size": 8},
    "some": {"num_virtual_tokens": 4, "layers_to_transform": [0, 2]},
    "shifted": {"num_virtual_tokens": 3, "shift_positions": True},
}
LABELS = {"short": 3, "long": 2, "some": 7, "shifted": 3}


def save(folder, kind, name, labels=None, task="own", **settings):
    """Save a random adapter with a head for this number of labels."""
    auto_class, task_type = TASKS[kind]
    base = tiny.model(kind, auto_class, num_labels=labels or LABELS[name])
    settings = {"entry_point": "attention" if kind == "distilbert" else "cache", **SETTINGS[name], **settings}
    config = PrefixTuningV2Config(task_type=task_type if task == "own" else task, **settings)
    model = get_peft_model(base, config)
    tiny.randomize(model, seed=sum(map(ord, name)))
    model.save_pretrained(folder / name)
    return str(folder / name)


def alone(kind, folder, name):
    """The model with one adapter, loaded by PEFT as usual."""
    auto_class, _ = TASKS[kind]
    return PeftModel.from_pretrained(tiny.model(kind, auto_class, num_labels=LABELS[name]), folder / name).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four adapters of each kind of model."""
    root = tmp_path_factory.mktemp("adapters")
    for kind in TASKS:
        for name in SETTINGS:
            save(root / kind, kind, name)
    return root


def pool_of(kind, **kwargs):
    return AdapterPool(tiny.model(kind, TASKS[kind][0]), **kwargs)


@pytest.mark.parametrize("kind", TASKS)
def test_each_row_as_if_alone(kind, folders):
    pool, names = pool_of(kind), ["long", None, "short", "some", "shifted", "long"]
    ids = tiny.ids(len(names))
    logits = pool([name and folders / kind / name for name in names], input_ids=ids).logits
    for row, name in enumerate(names):
        model = alone(kind, folders / kind, name) if name else tiny.model(kind, TASKS[kind][0])
        with torch.no_grad():
            expected = model(input_ids=ids[row : row + 1]).logits[0]
        own = logits[row, ..., : expected.shape[-1]]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)
        assert torch.isneginf(logits[row, ..., expected.shape[-1] :]).all()


def test_one_entry_point_for_all(folders, tmp_path):
    other = save(tmp_path, "bert", "short", entry_point="attention")
    pool = pool_of("bert")
    pool.load(folders / "bert" / "short")
    with pytest.raises(ValueError, match=r"short cannot be loaded: .*'attention'.*must have the same"):
        pool.load(other)
    assert list(pool.loaded) == [str(folders / "bert" / "short")]
    pool.remove(folders / "bert" / "short")
    pool.load(other)


def test_generate(folders):
    pool, names = pool_of("llama"), ["long", None, "short", "some"]
    ids = tiny.ids(len(names))
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = pool.generate([name and folders / "llama" / name for name in names], input_ids=ids, **arguments)
    for row, name in enumerate(names):
        model = alone("llama", folders / "llama", name) if name else tiny.model("llama", DECODER)
        assert torch.equal(tokens[row], model.generate(input_ids=ids[row : row + 1], **arguments)[0])


def test_label_names(tmp_path):
    """The adapters have their own, and the model keeps those of its own head: each row has another adapter."""
    names = {"first": ["a", "b", "c"], "second": ["x", "y", "z"]}
    folders = {key: save(tmp_path / key, "bert", "short", label_names=each) for key, each in names.items()}
    pool = pool_of("bert")
    own = dict(pool.model.config.id2label)
    assert len(own) == 3
    for _ in range(2):
        for key, folder in folders.items():
            assert pool.load(folder).label_names == tuple(names[key])
            assert pool.model.config.id2label == own
        for folder in folders.values():
            pool.remove(folder)
            assert pool.model.config.id2label == own


def test_num_labels_and_bytes(folders):
    pool = pool_of("bert")
    loaded = pool.load(folders / "bert" / "some")
    columns = 2 * 2 * tiny.HIDDEN
    assert (loaded.num_labels, loaded.task_type) == (7, "SEQ_CLS")
    assert loaded.num_bytes == 4 * (4 * columns + 7 * tiny.HIDDEN + 7)
    folded = pool.load(folders / "bert" / "long")
    assert folded.num_bytes == 4 * (6 * 6 * tiny.HIDDEN + 2 * tiny.HIDDEN + 2)
    assert pool.num_bytes == loaded.num_bytes + folded.num_bytes


def test_least_recently_used_are_dropped(folders):
    paths = {name: str(folders / "bert" / name) for name in SETTINGS}
    sizes = {name: pool_of("bert").load(path).num_bytes for name, path in paths.items()}
    pool = pool_of("bert", max_bytes=sizes["short"] + sizes["some"] + sizes["shifted"])
    for name in ("short", "some", "shifted", "short"):
        pool([paths[name]], input_ids=tiny.ids(1))
    pool.load(paths["long"])
    assert list(pool.loaded) == [paths["short"], paths["long"]]  # "some" and "shifted" were used before "short"
    names = {name for name, _ in pool.model.named_parameters()}
    assert not any(f".{gone}." in name for name in names for gone in ("adapter1", "adapter2"))
    everything = [paths[name] for name in ("short", "some", "shifted", "long")]
    with pytest.raises(ValueError, match=r"of this batch have .* bytes together; `max_bytes`"):
        pool(everything, input_ids=tiny.ids(4))
    tight = pool_of("bert", max_bytes=sizes["short"] - 1)
    with pytest.raises(ValueError, match="`max_bytes` of the pool is"):
        tight.load(paths["short"])
    assert not tight.loaded


def test_a_batch_may_fill_the_pool(folders):
    paths = [str(folders / "bert" / name) for name in ("short", "some", "long")]
    total = sum(pool_of("bert").load(path).num_bytes for path in paths)
    pool = pool_of("bert", max_bytes=total)
    for first in range(3):  # with different adapters in memory
        pool([folders / "bert" / "shifted", paths[first]], input_ids=tiny.ids(2))
        pool(paths, input_ids=tiny.ids(3))
        assert set(pool.loaded) == set(paths)


def test_loaded_adapter_is_not_searched_again(tmp_path):
    """A batch whose adapters are in memory reads no files and does not ask the Hub."""
    path, ids = save(tmp_path, "bert", "short"), tiny.ids(1)
    pool = pool_of("bert")
    expected = pool([path], input_ids=ids).logits
    (tmp_path / "short").rename(tmp_path / "elsewhere")
    assert torch.equal(pool([path], input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_removing_the_last_adapter_leaves_the_base_model(kind, folders):
    pool, ids = pool_of(kind), tiny.ids()
    before = {name: value.clone() for name, value in pool.model.state_dict().items()}
    expected = pool([None, None], input_ids=ids).logits
    for name in ("some", "short"):
        pool.load(folders / kind / name)
    for name in ("some", "short"):
        pool.remove(folders / kind / name)
    assert pool.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pool.model.state_dict().items())
    assert torch.equal(pool([None, None], input_ids=ids).logits, expected)
    assert pool([folders / kind / "some"], input_ids=ids[:1]).logits.shape == (1, 7)


def test_refused(folders, tmp_path):
    pool, ids = pool_of("bert"), tiny.ids(1)
    good = folders / "bert" / "short"
    expected = pool([good], input_ids=ids).logits
    get_peft_model(tiny.model("bert"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    damaged = save(tmp_path, "bert", "shifted")
    file = tmp_path / "shifted" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    for wrong, words in (
        (tmp_path / "lora", "LORA adapter, not one of PREFIX_TUNING_V2"),
        (
            save(tmp_path, "bert", "long", task="TOKEN_CLS"),
            "for TOKEN_CLS, and the adapters in the pool are for SEQ_CLS",
        ),
        (save(tmp_path, "llama", "some"), "is an adapter for CAUSAL_LM"),
        (damaged, "is damaged"),
    ):
        with pytest.raises(ValueError, match=words):
            pool([wrong], input_ids=ids)
        assert list(pool.loaded) == [str(good)]
    with pytest.raises(ValueError, match="is damaged"):
        pool_of("bert").load(damaged)
    assert torch.equal(pool([good], input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="2 names for a batch of 1"):
        pool([good, None], input_ids=ids)
    with pytest.raises(ValueError, match="`max_bytes` must be a positive integer"):
        pool_of("bert", max_bytes=0)
    with pytest.raises(KeyError):
        pool.remove("never loaded")


def test_no_such_adapter_on_disk_or_hub(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no adapter 'no/such/thing'"):
        pool_of("bert").load("no/such/thing")


@pytest.mark.parametrize("first", [True, False])
def test_loading_is_all_or_nothing(first, folders):
    """After an error or a Ctrl-C at any step, the other adapters and the base model give their outputs as before."""
    paths = [str(folders / "bert" / name) for name in ("some", "long")]
    ids, wanted = tiny.ids(2), paths[0 if first else 1]

    def pool():
        made = pool_of("bert")
        if not first:
            made.load(paths[0])
        return made

    complete = pool()
    with Steps() as steps:
        complete.load(wanted)
    expected = complete(paths, input_ids=ids).logits
    for at in steps.points(15):
        made = pool()
        rows = [None, *made.loaded]
        before = made(rows, input_ids=ids[: len(rows)]).logits
        names = {name for name, _ in made.model.named_modules()}
        with Steps(at) as interrupted:
            try:
                made.load(wanted)
            except KeyboardInterrupt:
                pass
            else:
                continue
        assert torch.equal(made(rows, input_ids=ids[: len(rows)]).logits, before), interrupted.where
        if wanted not in made.loaded:
            assert {name for name, _ in made.model.named_modules()} == names, interrupted.where
        assert torch.equal(made(paths, input_ids=ids).logits, expected), interrupted.where


@pytest.mark.parametrize("damage", ["modules_to_save", "swapped", "unreadable"])
def test_a_first_load_that_fails_after_the_check(damage, tmp_path, monkeypatch):
    path, ids = save(tmp_path, "bert", "some"), tiny.ids(2)
    pool = pool_of("bert")
    expected = pool([None, None], input_ids=ids).logits
    read = peft.peft_model.load_peft_weights

    def between(*args, **kwargs):
        if damage == "unreadable":
            raise OSError(5, "Input/output error")
        return {name: tensor * torch.nan for name, tensor in read(*args, **kwargs).items()}

    config = tmp_path / "some" / "adapter_config.json"
    good = config.read_text()
    with monkeypatch.context() as patch, pytest.raises(OSError if damage == "unreadable" else ValueError):
        if damage == "modules_to_save":
            config.write_text(json.dumps({**json.loads(good), "modules_to_save": ["base_model"]}))
        else:
            patch.setattr(peft.peft_model, "load_peft_weights", between)
        pool.load(path)
    assert not pool.loaded and torch.equal(pool([None, None], input_ids=ids).logits, expected)
    config.write_text(good)
    assert pool([path], input_ids=ids[:1]).logits.shape == (1, 7)


def grow(folder, tokens=None, labels=None, width=None):
    """Enlarge a saved adapter of a BERT, its config and its file. The file is sparse and takes no space."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    shapes = {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    settings = json.loads(config.read_text())
    table, head = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_", "base_model.model.classifier."
    if tokens:
        settings["num_virtual_tokens"] = shapes[f"{table}embedding.weight"][0] = tokens
    if width:
        settings["encoder_hidden_size"] = width
        shapes[f"{table}hidden.weight"][0] = shapes[f"{table}hidden.bias"][0] = width
        shapes[f"{table}output.weight"][1] = width
    if labels:
        shapes[f"{head}weight"][0] = shapes[f"{head}bias"][0] = labels
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        target.truncate(8 + len(text) + end)
    config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "changes", "bounds", "words"),
    [
        ("short", {"tokens": 300_000}, {}, "300,000 virtual tokens; `max_virtual_tokens` of the pool is 1,024"),
        ("short", {"tokens": 33}, {"max_virtual_tokens": 32}, "33 virtual tokens; .* is 32"),
        ("short", {"tokens": 10**6}, {"max_virtual_tokens": None}, "parameters, more than"),
        ("short", {"labels": 10**6}, {}, "1,000,000 labels; `max_labels` of the pool is 10,000"),
        ("short", {"labels": 8}, {"max_labels": 7}, "8 labels; .* is 7"),
        ("short", {"labels": 10**7}, {"max_labels": None}, "parameters, more than"),
        ("long", {"width": 10**6}, {}, "parameters, more than"),
        ("short", {"tokens": 1000}, {"max_bytes": 768_000}, "bytes; `max_bytes` of the pool is 768,000"),
        ("long", {"tokens": 1000, "width": 9}, {"max_bytes": 768_000}, "bytes; `max_bytes` of the pool is 768,000"),
    ],
)
def test_adapters_beyond_the_bounds_are_refused(name, changes, bounds, words, tmp_path, monkeypatch):
    """It is rejected before its numbers are read and before the model changes."""
    path = save(tmp_path, "bert", name)
    grow(tmp_path / name, **changes)
    pool, ids = pool_of("bert", **bounds), tiny.ids(1)
    expected = pool([None], input_ids=ids).logits

    def unreached(*args, **kwargs):
        raise AssertionError("it was given to PEFT")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "from_pretrained", unreached)
        with pytest.raises(ValueError, match=words):
            pool([path], input_ids=ids)
    assert not pool.loaded and torch.equal(pool([None], input_ids=ids).logits, expected)


def test_adapters_within_the_bounds_are_loaded(tmp_path):
    for name, changes in (("short", {"tokens": 40, "labels": 50}), ("long", {"tokens": 40, "width": 30})):
        path = save(tmp_path, "bert", name)
        grow(tmp_path / name, **changes)
        size = pool_of("bert").load(path).num_bytes
        pool = pool_of("bert", max_virtual_tokens=40, max_labels=50, max_bytes=size)
        assert pool.load(path).num_bytes == size
    for bound in ("max_bytes", "max_virtual_tokens", "max_labels"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"`{bound}` must be a positive integer"):
                pool_of("bert", **{bound: value})


def test_threads(folders):
    """Eight threads use one pool, which is too small for all adapters."""
    paths = {name: str(folders / "bert" / name) for name in SETTINGS}
    ids = tiny.ids(8)
    expected = {}
    for name in SETTINGS:
        with torch.no_grad():
            expected[name] = alone("bert", folders / "bert", name)(input_ids=ids).logits
    sizes = {name: pool_of("bert").load(path).num_bytes for name, path in paths.items()}
    pool = pool_of("bert", max_bytes=2 * max(sizes.values()))
    wrong: list = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(10):
                names = [list(SETTINGS)[i] for i in torch.randint(4, (2,), generator=generator)]
                rows = torch.randint(8, (2,), generator=generator)
                logits = pool([paths[name] for name in names], input_ids=ids[rows]).logits
                for own, name, row in zip(logits, names, rows, strict=True):
                    right = expected[name][row]
                    if not torch.allclose(own[: len(right)], right, atol=1e-5):
                        wrong.append((name, own, right))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.num_bytes <= pool.max_bytes
