"""The example server: right answers in any company, a sentence for all else, and a server that goes on answering."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_adapter import PrefixTuningV2Config

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
psutil = pytest.importorskip("psutil")
uvicorn = pytest.importorskip("uvicorn")

SERVER = Path(__file__).parents[2] / "examples" / "server"
sys.path.insert(0, str(SERVER))
import app as example  # noqa: E402
import process as processes  # noqa: E402
import worker as work  # noqa: E402
from process import Question  # noqa: E402
from settings import Settings  # noqa: E402
from worker import Worker  # noqa: E402

CLASSIFIER, DECODER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
# The base model has 3 labels. "plain" has no recipe, and "shifted" moves positions.
LABELS = {"two": 2, "three": 3, "seven": 7, "plain": 5, "shifted": 4}
SETTINGS = Settings(
    threads=1, head_seconds=1.0, body_seconds=1.0, write_seconds=1.0, answer_seconds=20.0, max_body_bytes=30_000
)


def tokenizer_of():
    words = {"[PAD]": 0, "[EOS]": 2, **{f"w{i}": i for i in range(5, tiny.VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w5"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")


def make_adapter(folder, labels, kind="bert", recipe=True, seed=None, **options):
    """Save a random adapter with a head of `labels` outputs, or one for a decoder without `labels`."""
    auto_class, task = (CLASSIFIER, "SEQ_CLS") if labels else (DECODER, "CAUSAL_LM")
    base = tiny.model(kind, auto_class, **({"num_labels": labels} if labels else {}))
    options = {"num_virtual_tokens": labels or 20, **options}
    model = get_peft_model(base, PrefixTuningV2Config(task_type=task, **options))
    tiny.randomize(model, seed=labels if seed is None else seed)
    model.save_pretrained(folder)
    if labels and recipe:
        (folder / "recipe.yaml").write_text(f"labels: {[f'{folder.name} {i}' for i in range(labels)]}")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, labels in LABELS.items():
        options = {"shift_positions": True, "num_virtual_tokens": 20} if name == "shifted" else {}
        make_adapter(root / name, labels, recipe=name != "plain", **options)
    for seed, name in enumerate(("prose", "verse")):
        make_adapter(root / name, 0, "llama", seed=seed)
    shutil.copytree(root / "two", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"no such thing")
    return root


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, model in (("bert", tiny.model("bert", CLASSIFIER)), ("llama", tiny.model("llama", DECODER))):
        model.save_pretrained(root / name)
        tokenizer_of().save_pretrained(root / name)
    return root


def alone(adapters, name, text):
    """Label and probability of an adapter that has a model for itself, without padding."""
    count = LABELS.get(name, 3)
    model = tiny.model("bert", CLASSIFIER, num_labels=count)
    model = PeftModel.from_pretrained(model, adapters / name).eval() if name else model
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokenizer_of()(text)["input_ids"]])).logits[0].softmax(-1)
    best = expected.argmax().item()
    label = {None: f"LABEL_{best}", "plain": best}.get(name, f"{name} {best}")
    return {"label": label, "probability": pytest.approx(expected[best].item(), abs=1e-5)}


# ---- The worker: answers


@pytest.fixture
def classifier(adapters):
    return Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of(), adapters, SETTINGS)


def ask(worker, name, text="w6 w7"):
    (answer,) = worker.answer([Question(name, text)])
    return answer


def refused(worker, name):
    """The status and the sentence for an adapter that cannot be used, which must not keep others from answering."""
    answer = ask(worker, name)
    assert "label" in ask(worker, None)
    return answer["status"], answer["detail"]


@pytest.mark.parametrize("name", [*LABELS, None])
def test_labels_are_those_of_the_head(classifier, adapters, name):
    """Alone, and beside heads that are smaller and larger."""
    expected = [alone(adapters, name, text) for text in ("w6 w7", "w50 w8 w9 w10 w60 w61", "w9")]
    texts = ["w6 w7", "w50 w8 w9 w10 w60 w61", "w9"]
    assert [ask(classifier, name, text) for text in texts] == expected
    company = [Question(other, "w11 w12 w13") for other in LABELS]
    answers = classifier.answer([*company, *(Question(name, text) for text in texts), *company])
    assert answers[len(company) : -len(company)] == expected
    assert answers[: len(company)] == [alone(adapters, other, "w11 w12 w13") for other in LABELS]


def test_one_row_that_fails_fails_alone(classifier, monkeypatch):
    def fails(rows):
        if any(row.input_ids == [13] for row in rows):
            raise RuntimeError("thirteen")
        return Worker.classify(classifier, rows)

    monkeypatch.setattr(classifier, "classify", fails)
    answers = classifier.answer([Question("two", f"w{number}") for number in range(10, 18)])
    assert answers[3]["status"] == 500 and "thirteen" not in answers[3]["detail"]
    assert all("label" in answer for number, answer in enumerate(answers) if number != 3)


def test_adapters_that_do_not_fit_into_memory_together(adapters, caplog):
    """They are loaded one after the other, and each row still has its own."""
    worker = Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of(), adapters, SETTINGS)
    sizes = {name: worker.pool.load(adapters / name).num_bytes for name in ("two", "seven")}
    settings = dataclasses.replace(SETTINGS, max_bytes=max(sizes.values()))
    worker = Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of(), adapters, settings)
    names = ["two", "seven", None, "two", "seven"]
    answers = worker.answer([Question(name, "w6 w7") for name in names])
    assert answers == [alone(adapters, name, "w6 w7") for name in names]
    assert worker.loaded().keys() == {"seven"}
    assert "failed" not in caplog.text


def test_shifted_positions_count(classifier, caplog):
    """`shift_positions` takes 20 of the 64 positions; the rows beside it keep theirs."""
    assert "label" in ask(classifier, "shifted", "w6 " * 44)
    too_long = ask(classifier, "shifted", "w6 " * 45)
    assert too_long["status"] == 422 and "1 to 44 in all" in too_long["detail"]
    long, short = "w6 " * 64, "w7 w8 w9"
    alone = [ask(classifier, "two", long), ask(classifier, "shifted", short)]
    together = classifier.answer([Question("two", long), Question("shifted", short)])
    for one, other in zip(alone, together, strict=True):
        assert one == {"label": other["label"], "probability": pytest.approx(other["probability"], abs=1e-5)}
    assert "failed" not in caplog.text


def test_positions_behind_padding_are_not_counted_twice(adapters):
    """RoBERTa's table has two rows more than it takes tokens."""
    worker = Worker("classify", tiny.model("roberta", CLASSIFIER), tokenizer_of(), adapters, SETTINGS)
    assert "label" in ask(worker, None, "w6 " * 64)
    assert ask(worker, None, "w6 " * 65)["status"] == 422


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_as_alone(tmp_path, caplog, kind):
    """Rows that want many tokens beside long ones; GPT-2 has a table of 64 positions."""
    for seed, name in enumerate(("prose", "verse")):
        make_adapter(tmp_path / name, 0, kind, seed=seed)
    worker = Worker("generate", tiny.model(kind, DECODER), tokenizer_of(), tmp_path, SETTINGS)
    requests = [("prose", "w6 w7 w8", 5), ("verse", "w9", 40), (None, "w10 w11 " * 30, 4), ("prose", "w12", 8)]
    answers = worker.answer([Question(*each) for each in requests])
    for (name, text, count), answer in zip(requests, answers, strict=True):
        model = tiny.model(kind, DECODER)
        model = PeftModel.from_pretrained(model, tmp_path / name).eval() if name else model
        ids = torch.tensor([tokenizer_of()(text)["input_ids"]])
        tokens = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        assert answer["text"] == tokenizer_of().decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert "failed" not in caplog.text


def test_generation_stops_when_nobody_waits(adapters):
    """The last of the two who wait goes, or has all that was asked for, after 3 tokens."""
    gone = [0, 1]
    worker = Worker("generate", tiny.model("llama", DECODER), tokenizer_of(), adapters, SETTINGS, gone)
    steps = []

    def count(*_):
        steps.append(None)
        gone[0] = len(steps) == 3

    worker.pool.model.model.register_forward_hook(count)
    worker.answer([Question("prose", "w6", 50, row=0), Question("verse", "w7", 50, row=1)])
    assert len(steps) == 3
    worker.answer([Question("prose", "w6", 3, row=0), Question("verse", "w7", 50, row=1)])
    assert len(steps) == 6


# ---- The worker: folders of adapters


@pytest.fixture
def folder(adapters, tmp_path):
    """A copy of the adapter "two", the only one in its folder."""
    return Path(shutil.copytree(adapters / "two", tmp_path / "root" / "two"))


@pytest.fixture
def worker(folder):
    return Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of(), folder.parent, SETTINGS)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + "labels: *a39\n"
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("labels: [a, b, c]", "3 labels, and its head 2 outputs"),
        ("labels: [a]", "1 labels, and its head 2 outputs"),
        ("labels: []", "0 labels"),
        ("labels: a", "must be a list"),
        ("labels: [a, [b]]", "must be a list"),
        ("labels: [yes, no]", "must be a list"),
        ("labels: [1.5, .nan]", "must be a list"),
        ('labels: [a, "\\uD800"]', "must be a list"),
        (f"labels: [a, {'b' * 2000}]", "must be a list"),
        (f"labels: [1, {'9' * 30}]", "must be a list"),
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("a: " + "[" * 5000, "cannot be read"),
        ("labels: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("labels: [a, b]\x00", "cannot be read"),
        ("labels: [" + "a, " * 40_000 + "]", "more than 100,000 bytes"),
        ("task_kwargs: {problem_type: regression}", "not trained to answer with one of several labels"),
        ("task_kwargs: {problem_type: multi_label_classification}\nlabels: [a, b]", "not trained to answer"),
    ],
)
def test_recipes_of_strangers(worker, folder, recipe, words):
    (folder / "recipe.yaml").write_text(recipe)
    started = time.perf_counter()
    status, detail = refused(worker, "two")
    assert status == 422 and words in detail and len(detail) < 700
    assert time.perf_counter() - started < 5
    assert str(folder.parent) not in detail


@pytest.mark.parametrize("recipe", ["", "- a", "7", "model: elsewhere\nlabels:", "task_kwargs: 7\nlabels: [1, 2]"])
def test_recipes_without_labels(worker, folder, recipe):
    (folder / "recipe.yaml").write_text(recipe)
    assert ask(worker, "two")["label"] in (0, 1, 2)


def test_a_recipe_that_is_no_text(worker, folder):
    (folder / "recipe.yaml").write_bytes(b"labels: [\xff\xfe]")
    assert "cannot be read" in refused(worker, "two")[1]


def test_links_lead_nowhere_else(worker, folder, tmp_path, adapters):
    for name in work.FILES:
        moved = tmp_path / name
        (folder / name).rename(moved)
        (folder / name).symlink_to(moved)
        status, detail = refused(worker, "two")
        assert status == 422 and f"its {name} is a link that leads out" in detail
        (folder / name).unlink()
        moved.rename(folder / name)
    (folder.parent / "elsewhere").symlink_to(adapters / "three")
    assert "leads out" in refused(worker, "elsewhere")[1]
    (folder.parent / "inside").symlink_to(folder)
    assert ask(worker, "inside") == ask(worker, "two")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names here")
def test_a_pipe_is_not_waited_for(worker, folder):
    for name in work.FILES:
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        assert "is not a file" in refused(worker, "two")[1]
        (folder / name).unlink()
        (folder / "kept").rename(folder / name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_type": "CAUSAL_LM"}, "for the task"),
        ({"task_type": None}, "for the task None"),
        ({"num_virtual_tokens": 300_000}, "300,000 virtual tokens"),
        ({"num_virtual_tokens": "7"}, ""),
        ({"num_virtual_tokens": 7}, "shape"),
        ({"peft_type": "LORA"}, "another method"),
        ({"peft_type": ["X"]}, ""),
        ({"modules_to_save": ["base_model"]}, "modules_to_save"),
        ({"layers_to_transform": {"a": 1}}, ""),
    ],
)
def test_configs_of_strangers(worker, folder, changes, words):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    status, detail = refused(worker, "two")
    assert status == 422 and words in detail and "'two' cannot be used: " in detail


@pytest.mark.parametrize("config", ["", "[]", "{", "[" * 50_000, '{"a": ' * 10_000, "null", "\x00", " " * 200_000])
def test_configs_that_are_none(worker, folder, config):
    (folder / "adapter_config.json").write_text(config)
    status, detail = refused(worker, "two")
    assert status == 422 and "'two' cannot be used: " in detail


def test_another_method(worker, folder):
    model = get_peft_model(tiny.model("bert", CLASSIFIER), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(folder.parent / "lora")
    assert "another method" in refused(worker, "lora")[1]


def test_an_adapter_that_is_mended(worker, folder, adapters):
    """What was refused is refused from memory until the files change, and then tried again."""
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    status, detail = refused(worker, "two")
    assert status == 422 and "two/adapter_model.safetensors is damaged" in detail
    asked = []
    load = worker.pool.load
    worker.pool.load = lambda adapter: asked.append(adapter) or load(adapter)
    assert refused(worker, "two") == (status, detail) and not asked
    weights.write_bytes(good)
    assert ask(worker, "two") == alone(adapters, "two", "w6 w7") and asked


def test_a_trouble_of_the_machine_is_tried_again(worker, folder, adapters, monkeypatch):
    def fails(*_):
        raise OSError("the disk is away")

    with monkeypatch.context() as context:
        context.setattr(worker.pool, "load", fails)
        assert refused(worker, "two") == (503, "Adapter 'two' cannot be loaded now: the disk is away")
    assert ask(worker, "two") == alone(adapters, "two", "w6 w7")


def test_adapters_that_change_places(worker, folder, adapters):
    """Two folders are swapped between two requests, one is replaced in place, and one is taken away."""
    root = folder.parent
    shutil.copytree(adapters / "seven", root / "seven")
    assert [ask(worker, name)["label"][:-2] for name in ("two", "seven")] == ["two", "seven"]
    for old, new in (("two", "kept"), ("seven", "two"), ("kept", "seven")):
        (root / old).rename(root / new)
    for name, meant in (("two", "seven"), ("seven", "two")):
        assert ask(worker, name) == alone(adapters, meant, "w6 w7")
    for name in work.FILES:
        shutil.copy(adapters / "three" / name, root / "two" / name)
    assert ask(worker, "two") == alone(adapters, "three", "w6 w7")
    shutil.rmtree(root / "seven")
    assert refused(worker, "seven")[0] == 404
    assert worker.loaded().keys() == {"two"}


def test_an_adapter_that_is_rewritten_while_it_is_read(worker, folder, adapters, monkeypatch):
    """The labels of one version and the weights of another must not answer together."""
    load = worker.pool.load

    def meanwhile(path):
        result = load(path)
        for name in work.FILES:
            shutil.copy(adapters / "seven" / name, folder / name)
        return result

    with monkeypatch.context() as context:
        context.setattr(worker.pool, "load", meanwhile)
        assert refused(worker, "two") == (503, "Adapter 'two' is being written; retry.")
    assert ask(worker, "two") == alone(adapters, "seven", "w6 w7")


def test_a_batch_has_one_version_of_an_adapter(worker, folder, adapters, monkeypatch):
    """The adapter changes while the rows are tokenised; all rows still answer with the labels of their weights."""
    assert ask(worker, "two") == alone(adapters, "two", "w6 w7")
    tokenize = worker.tokenizer

    class Meanwhile:
        pad = tokenize.pad

        def __call__(self, *args, **kwargs):
            for name in work.FILES:
                shutil.copy(adapters / "seven" / name, folder / name)
            return tokenize(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(worker, "tokenizer", Meanwhile())
        assert worker.answer([Question("two", "w6 w7")] * 3) == [alone(adapters, "two", "w6 w7")] * 3
    assert ask(worker, "two") == alone(adapters, "seven", "w6 w7")


def test_no_name_reaches_the_hub(adapters, monkeypatch):
    """The pool takes a relative path that does not exist for a name on the Hub."""
    monkeypatch.chdir(adapters.parent)
    worker = Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of(), Path(adapters.name), SETTINGS)
    assert ask(worker, "two") == alone(adapters, "two", "w6 w7")
    assert all(Path(key).is_absolute() for key in worker.pool.loaded)


# ---- The server: requests, over real connections


class Live:
    """A server in a thread with a worker in another, at the end of real connections."""

    def __init__(self, adapters, settings=SETTINGS):
        self.settings = settings
        model = tiny.model("bert", CLASSIFIER)
        processes._worker = Worker("classify", model, tokenizer_of(), adapters, settings)
        with pytest.MonkeyPatch.context() as context:
            abandoned = [0] * settings.max_batch
            context.setattr(example, "new_process", lambda *_: (ThreadPoolExecutor(1), abandoned))
            self.service = example.Service("classify", "bert", adapters, settings)
        app = example.create_app(self.service)
        options = example.uvicorn_options(settings)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(15)
        return connection

    def exchange(self, *parts, pause=0.0):
        """Send bytes, part after part, and return all that comes until the server closes the connection."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # the server may have closed the connection
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while more := connection.recv(65536):
                    answer += more
            return answer.decode()

    def post(self, body, path="/classify", headers="Content-Type: application/json\r\n"):
        """The status and the body of the answer to a request."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return status_and_body(self.exchange(request(body, path, headers)))

    def get(self, path):
        return status_and_body(self.exchange(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()))

    def count(self, path, status):
        found = re.search(rf'requests_total{{path="{path}",status="{status}"}} (\S+)', self.get("/metrics")[1])
        return float(found[1]) if found else 0.0


def request(body, path="/classify", headers="Content-Type: application/json\r\n", close=True):
    headers += "Connection: close\r\n" if close else ""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def status_and_body(answer):
    head, _, body = answer.partition("\r\n\r\n")
    return (int(head.split()[1]) if head else None), body


@pytest.fixture(scope="module")
def live(adapters):
    server = Live(adapters)
    yield server
    server.stop()


GOOD = {"adapter": "two", "text": "w6 w7"}


def works(live):
    status, body = live.post(GOOD)
    return status == 200 and json.loads(body)["label"].startswith("two ")


JSON = b'{"adapter": "two", "text": "w6"%s}'


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"adapter": "nothing", "text": "w6"}, 404, "no adapter 'nothing'"),
        ({"adapter": "../adapters/two", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "..", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "/etc", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "two/", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "two\n", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "user/name", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "two\x00", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "", "text": "w6"}, 422, "adapter: String should match"),
        ({"adapter": "a" * 5000, "text": "w6"}, 422, "adapter: String should have at most 100"),
        ({"adapter": "a" * 100, "text": "w6"}, 404, "no adapter"),
        ({"adapter": "broken", "text": "w6"}, 422, "is damaged"),
        ({"adapter": "prose", "text": "w6"}, 422, "cannot be used"),
        ({"adapter": 7, "text": "w6"}, 422, "adapter: Input should be a valid string"),
        ({"text": ""}, 422, "text: String should have at least 1"),
        ({"text": " "}, 422, "0 tokens"),
        ({"text": "w6 " * 65}, 422, "65 tokens"),
        ({"text": "w" * 20_001}, 422, "20,000 characters"),
        ({"text": ["w6"]}, 422, "text: Input should be a valid string"),
        ({"text": "w6", "max_tokens": 3}, 422, "max_tokens: Extra inputs are not permitted"),
        ({}, 422, "text: Field required"),
        ([], 422, "body: Input should be"),
        (b"", 422, "body: Field required"),
        (b"null", 422, "body: "),
        (b"{", 400, "not valid JSON"),
        (JSON % b', "n": NaN', 400, "NaN is not a JSON number"),
        (JSON % b', "n": -Infinity', 400, "-Infinity is not a JSON number"),
        (JSON % b', "n": 1e400', 422, "n: Extra inputs"),
        (JSON % (b', "n": ' + b"9" * 9000), 400, "not valid JSON"),
        (JSON % b', "text": "w7"', 400, "occurs twice"),
        (b'{"text": "\\ud800"}', 422, "text: Input should be a valid string"),
        (b'{"adapter": "\\ud800", "text": "w6"}', 422, "adapter: Input should be a valid string"),
        (JSON % b', "\\ud800": 1', 422, "Input should be a valid string"),
        (b'{"text": "\xff\xfe"}', 400, "not valid JSON"),
        ('{"text": "w6"}'.encode("utf-16"), 400, "not valid JSON"),
        (b"[" * 29_000, 400, "nested too deeply"),
        (b'{"a":' * 5000, 400, "nested too deeply"),
        (b'{"text": "' + b"w" * 30_000 + b'"}', 413, "30,000 bytes"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_mistakes(live, body, status, words):
    """Each has its status and a sentence that does not repeat what was sent, is counted, and harms nobody else."""
    before = live.count("/classify", status)
    found, text = live.post(body)
    assert found == status
    assert words in json.loads(text)["detail"] and len(text) < 700
    assert live.count("/classify", status) == before + 1
    assert works(live)


def test_paths_methods_and_types(live):
    assert live.get("/nothing")[0] == 404
    assert live.get("/../../etc/passwd")[0] == 404
    assert live.get("/classify")[0] == 405
    assert live.count("other", 404) >= 2 and live.count("/classify", 405) >= 1
    good = json.dumps(GOOD).encode()
    assert live.post(good, headers="Content-Type: application/json; charset=utf-8\r\n")[0] == 200
    for headers in ("", "Content-Type: text/plain\r\n", "Content-Type: multipart/form-data; boundary=x\r\n"):
        assert live.post(good, headers=headers)[0] == 415
    assert works(live)


def test_what_there_is(live):
    assert works(live)
    found = json.loads(live.get("/adapters")[1])["classify"]
    assert found["on_disk"] == sorted([*LABELS, "broken", "prose", "verse"])
    assert found["loaded"]["two"] > 0
    assert 'ready{service="classify"} 1.0' in live.get("/metrics")[1]
    assert live.get("/health/live")[0] == live.get("/health/ready")[0] == 200
    assert live.get("/docs")[0] == live.get("/openapi.json")[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET /\r\n\r\n", 400),
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 20_000), 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 9000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000, 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(20_000)), 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX\x00: y\r\n\r\n", 400),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999\r\n\r\n", 413),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n", 200),
    ],
    ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_no_http(live, sent, status):
    path = "/classify" if status == 413 else "other"
    before = live.count(path, status)
    assert status_and_body(live.exchange(sent))[0] == status
    assert status == 200 or live.count(path, status) == before + 1
    assert works(live)


def test_a_body_without_end(live):
    """It is refused as soon as it is too large, and not kept."""
    start = (
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"%x\r\n%s\r\n" % (10_000, b" " * 10_000)
    assert status_and_body(live.exchange(start, *[chunk] * 2000))[0] == 413
    announced = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
    assert status_and_body(live.exchange(announced, *[b" " * 10_000] * 2000))[0] == 413
    expects = announced[:-2] + b"Expect: 100-continue\r\n\r\n"
    assert status_and_body(live.exchange(expects))[0] == 413
    assert works(live)


def test_a_client_that_reads_after_it_has_sent(adapters):
    """Its body is too large, and it still gets to know why: a connection closed at once would be reset."""
    live = Live(adapters, dataclasses.replace(SETTINGS, body_seconds=20.0))
    try:
        connection = HTTPConnection("127.0.0.1", live.port)
        connection.request("POST", "/classify", b" " * 20_000_000, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 413 and b"30,000 bytes" in answer.read()
    finally:
        live.stop()


def test_slow_clients(live):
    """Headers and bodies that drip in, whole requests without an end, and connections without a request."""
    late = {"other": live.count("other", 408), "/classify": live.count("/classify", 408)}
    started = time.perf_counter()
    head = b"GET / HTTP/1.1\r\nHost: x\r\n"
    drip = [b"X: y\r\n"] * 20
    body = [request(b" " * 100)[:-90], *[b" "] * 20]
    chunks = [
        b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        *[b"1\r\n \r\n"] * 20,
    ]
    with ThreadPoolExecutor(40) as threads:
        jobs = [threads.submit(live.exchange, *parts, pause=0.1) for parts in ((head, *drip), body, chunks, (b"",))]
        jobs += [threads.submit(live.exchange, head) for _ in range(30)]
        assert works(live)
        assert all(status_and_body(job.result())[0] == 408 for job in jobs)
    assert time.perf_counter() - started < 8
    assert live.count("other", 408) == late["other"] + 32 and live.count("/classify", 408) == late["/classify"] + 2


def test_a_client_that_does_not_read(adapters):
    """As soon as an answer stays in the server's own buffer, the client has `write_seconds` to read."""
    live = Live(adapters)
    try:
        live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", live.port))
            connections = live.server.server_state.connections
            assert wait_until(lambda: connections)
            (protocol,) = connections
            while not protocol.transport.get_write_buffer_size():
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.01)
            assert protocol.transport.get_write_buffer_size() < 60_000  # less than asyncio calls too much
            assert wait_until(lambda: not connections)
        assert works(live)
    finally:
        live.stop()


def wait_until(condition, seconds=10.0):
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.02)
    return condition()


def test_idle_connections_are_closed(adapters):
    live = Live(adapters, dataclasses.replace(SETTINGS, keep_alive_seconds=1, head_seconds=3.0))
    try:
        with live.connect() as connection:
            started = time.perf_counter()
            connection.sendall(request(json.dumps(GOOD).encode(), close=False))
            answer = b""
            while more := connection.recv(65536):
                answer += more
        assert answer.count(b"HTTP/1.1 ") == 1 and 0.5 < time.perf_counter() - started < 2.9
    finally:
        live.stop()


def test_pipelined_requests_are_answered_in_turn(live):
    asked = [{"adapter": name, "text": "w6 w7"} for name in ("two", "seven", "nothing", "three")]
    sent = [request(json.dumps(each).encode(), close=each is asked[-1]) for each in asked]
    answers = live.exchange(b"".join(sent))
    assert re.findall(r"HTTP/1.1 (\d+)", answers) == ["200", "200", "404", "200"]
    assert re.findall(r'"label":"(\w+)', answers) == ["two", "seven", "three"]


# ---- The server: many requests


@pytest.fixture
def held(live, monkeypatch):
    """Holds the worker until it is set; the batches that it has computed."""
    release, batches = threading.Event(), []
    answer = processes._worker.answer

    def wait(batch):
        batches.append(batch)
        assert release.wait(20)
        return answer(batch)

    monkeypatch.setattr(processes._worker, "answer", wait)
    yield release, batches
    release.set()
    assert wait_until(lambda: not live.service.waiting)


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "one-adapter"])
def test_many_at_once(live, adapters, held, monkeypatch, mixed):
    release, batches = held
    monkeypatch.setattr(live.service, "settings", dataclasses.replace(SETTINGS, one_adapter_a_batch=not mixed))
    names = [[*LABELS, None][i % 6] for i in range(24)]
    texts = [f"w{7 + i} w{9 + i} w{11 + 2 * i}" + " w50" * (i % 4) for i in range(24)]
    with ThreadPoolExecutor(24) as threads:
        jobs = [
            threads.submit(live.post, {"adapter": name, "text": text}) for name, text in zip(names, texts, strict=True)
        ]
        assert wait_until(lambda: len(live.service.waiting) + len(batches[0]) == 24 if batches else False)
        release.set()
        answers = [json.loads(job.result()[1]) for job in jobs]
    assert answers == [alone(adapters, name, text) for name, text in zip(names, texts, strict=True)]
    assert all(len({question.adapter for question in batch}) == 1 for batch in batches) == (not mixed)


def test_nothing_waits_for_the_model(live, held):
    """Metrics, health and the list of adapters, while a batch is computed."""
    release, batches = held
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(live.post, GOOD)
        assert wait_until(lambda: batches)
        for path in ("/metrics", "/health/live", "/health/ready", "/adapters"):
            assert live.get(path)[0] == 200
        assert live.post({"text": ""})[0] == 422
        assert not job.done()
        release.set()
        assert job.result()[0] == 200


def test_clients_that_vanish(live, held):
    """Those who wait are taken out of the queue, and the rows of those who are computed are marked."""
    release, batches = held
    gone = live.count("/classify", 499)
    connections = [live.connect() for _ in range(5)]
    connections[0].sendall(request(json.dumps(GOOD).encode()))
    assert wait_until(lambda: batches)
    for connection in connections[1:]:
        connection.sendall(request(json.dumps(GOOD).encode()))
    assert wait_until(lambda: len(live.service.waiting) == 4)
    assert not live.service.abandoned[0]
    for connection in connections:
        connection.close()
    assert wait_until(lambda: not live.service.waiting and live.service.abandoned[0])
    release.set()
    assert wait_until(lambda: live.count("/classify", 499) == gone + 5)
    assert len(batches) == 1 and works(live)


def test_too_many(live, held, monkeypatch):
    release, batches = held
    monkeypatch.setattr(live.service, "settings", dataclasses.replace(SETTINGS, max_waiting=2))
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(live.post, GOOD)]
        assert wait_until(lambda: batches)
        jobs += [threads.submit(live.post, GOOD) for _ in range(2)]
        assert wait_until(lambda: len(live.service.waiting) == 2)
        answer = live.exchange(request(json.dumps(GOOD).encode()))
        assert status_and_body(answer)[0] == 503 and "retry-after: 1" in answer.lower()
        release.set()
        assert [job.result()[0] for job in jobs] == [200] * 3


def test_too_slow(live, held, monkeypatch):
    release, _ = held
    monkeypatch.setattr(live.service, "settings", dataclasses.replace(SETTINGS, answer_seconds=0.3))
    answer = live.exchange(request(json.dumps(GOOD).encode()))
    assert status_and_body(answer)[0] == 503 and "retry-after" in answer.lower()
    assert live.service.abandoned[0]
    release.set()
    monkeypatch.undo()
    assert works(live)


def test_too_many_connections(adapters):
    live = Live(adapters, dataclasses.replace(SETTINGS, max_connections=3))
    try:
        idle = [live.connect() for _ in range(3)]
        assert wait_until(lambda: len(live.server.server_state.connections) == 3)
        answer = live.exchange()
        assert status_and_body(answer)[0] == 503 and "Retry-After" in answer
        for connection in idle:
            connection.close()
        assert wait_until(lambda: not live.server.server_state.connections) and works(live)
        assert live.count("other", 503) >= 1
    finally:
        live.stop()


def test_a_batch_that_cannot_come_back(live, monkeypatch):
    """An error on the way to the worker, or from it, ends the batch and not the server."""

    def fails(batch):
        raise RuntimeError("secret")

    with monkeypatch.context() as context:
        context.setattr(processes._worker, "answer", fails)
        status, body = live.post(GOOD)
    assert status == 500 and "secret" not in body and live.count("/classify", 500) >= 1
    assert works(live)


# ---- The server: processes


# A worker without a model, for tests of the processes: it answers with the text, after a tenth of a second for each
# token that is asked for, unless nobody waits any more.
STUB = """
import os, pathlib, time

class Worker:
    def __init__(self, gone):
        self.gone = gone

    def ping(self):
        return os.getpid()

    def loaded(self):
        return {}

    def answer(self, batch):
        for question in batch:
            if question.text == "hang":
                time.sleep(1000)
            end = time.monotonic() + question.max_new_tokens / 10
            while time.monotonic() < end and not self.gone[question.row]:
                time.sleep(0.01)
        return [{"text": question.text} for question in batch]

def make_worker(kind, name, adapters, settings, gone):
    if not pathlib.Path(name).exists():
        raise OSError(f"there is no {name}")
    return Worker(gone)
"""
PACKAGE = SERVER.parent.parent


class Run:
    """The server as a user starts it, in a process of its own."""

    connect, exchange, post, get, count = Live.connect, Live.exchange, Live.post, Live.get, Live.count

    def __init__(self, log, *options, path=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        start = f"import sys; sys.path[:0] = {[*map(str, path), str(SERVER), str(PACKAGE)]}; import app; app.main()"
        command = [sys.executable, "-c", start, "--port", str(self.port), *map(str, options)]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, stderr=out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(30)

    def ready(self, status=200):
        with contextlib.suppress(OSError):
            return self.get("/health/ready")[0] == status
        return False

    def wait(self):
        assert wait_until(lambda: self.ready() or self.process.poll() is not None, 300), self.log.read_text()
        assert self.process.poll() is None, self.log.read_text()

    def workers(self):
        children = psutil.Process(self.process.pid).children()
        return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


@pytest.fixture
def run(tmp_path, request):
    """A server with the stub for a worker, whose batches have one row if the test does not say otherwise."""
    (tmp_path / "worker.py").write_text(STUB)
    (tmp_path / "base").touch()
    options = ["--adapters", tmp_path, "--generator", tmp_path / "base", "--max-batch", getattr(request, "param", 1)]
    with Run(tmp_path / "log", *options, path=[tmp_path]) as run:
        run.wait()
        yield run


def prompt(seconds, text="w6"):
    """A request that takes the stub some seconds."""
    return {"prompt": text, "max_new_tokens": int(seconds * 10)}


@pytest.mark.parametrize("run", [1, 64], indirect=True)
def test_a_worker_that_is_killed(run, tmp_path):
    """Those in flight get a 503, and another worker starts; if none can, the server ends and says why."""
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(run.post, prompt(20), "/generate")]
        time.sleep(0.3)
        jobs += [threads.submit(run.post, prompt(20), "/generate") for _ in range(2)]
        assert wait_until(lambda: 'waiting{service="generate"} 2.0' in run.get("/metrics")[1])
        (worker,) = run.workers()
        worker.kill()
        for job in jobs:
            status, body = job.result()
            assert status == 503 and "has ended" in body
    assert run.get("/health/live")[0] == 200
    run.wait()
    assert run.workers() != [worker]
    assert run.post(prompt(0.1), "/generate") == (200, '{"text":"w6"}')
    assert run.count("/generate", 503) == 3
    (tmp_path / "base").unlink()
    run.workers()[0].kill()  # while it does nothing
    assert run.process.wait(60) == 1
    log = run.log.read_text()
    assert f"there is no {tmp_path}" in log and "could not be loaded" in log and "The server ends." in log


def test_a_worker_that_hangs(tmp_path):
    """It is killed when its batch should have ended long ago."""
    (tmp_path / "worker.py").write_text(STUB)
    options = ["--adapters", tmp_path, "--generator", tmp_path, "--answer-seconds", "1"]
    with Run(tmp_path / "log", *options, path=[tmp_path]) as run:
        run.wait()
        assert run.post(prompt(0.1, "hang"), "/generate")[0] == 503
        assert wait_until(lambda: run.ready(503))
        run.wait()
        assert run.post(prompt(0.1), "/generate")[0] == 200
        assert "hangs, and is killed" in run.log.read_text()


def test_while_a_worker_starts(run, tmp_path):
    """The server lives and is not ready."""
    (tmp_path / "worker.py").write_text(f"import time\ntime.sleep(3)\n{STUB}")
    run.workers()[0].kill()
    assert wait_until(lambda: run.ready(503))
    assert run.get("/health/live")[0] == 200 and 'ready{service="generate"} 0.0' in run.get("/metrics")[1]
    answer = run.exchange(request(json.dumps(prompt(0.1)).encode(), "/generate"))
    assert status_and_body(answer)[0] == 503 and "retry-after" in answer.lower()
    run.wait()


@pytest.mark.parametrize("everybody", [False, True], ids=["server", "both"])
def test_sigterm_lets_requests_finish(run, everybody):
    """Also those that wait, and also if the worker gets the signal too, as from a service manager."""
    workers = run.workers()
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(run.post, prompt(1, text), "/generate") for text in ("w6", "w7")]
        assert wait_until(lambda: 'waiting{service="generate"} 1.0' in run.get("/metrics")[1])
        for each in [*(workers if everybody else []), run.process]:
            each.send_signal(signal.SIGTERM)
        assert [job.result() for job in jobs] == [(200, '{"text":"w6"}'), (200, '{"text":"w7"}')]
    assert run.process.wait(30) == -signal.SIGTERM
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_no_worker_outlives_the_server(run):
    workers = run.workers()
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(run.post, prompt(20), "/generate")
        time.sleep(0.3)
        run.process.kill()
        assert job.result()[0] is None
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_work_for_nobody_is_cancelled(run):
    """A request that would take 20 seconds, whose client goes; the next one has not to wait for it."""
    with run.connect() as connection:
        connection.sendall(request(json.dumps(prompt(20)).encode(), "/generate"))
        time.sleep(0.3)
    started = time.perf_counter()
    assert run.post(prompt(0.1), "/generate")[0] == 200
    assert time.perf_counter() - started < 10
    assert run.count("/generate", 499) == 1


def test_without_a_model_the_server_does_not_start(tmp_path):
    (tmp_path / "worker.py").write_text(STUB)
    with Run(tmp_path / "log", "--adapters", tmp_path, "--generator", tmp_path / "none", path=[tmp_path]) as run:
        assert run.process.wait(60) > 0
    assert "there is no" in run.log.read_text() and "could not be loaded" in run.log.read_text()


def test_as_a_user_has_it(adapters, bases, tmp_path):
    """With a model, in a process of its own; the server's own process has no torch."""
    with Run(tmp_path / "log", "--adapters", adapters, "--generator", bases / "llama", "--threads", "1") as run:
        run.wait()
        worker = Worker("generate", tiny.model("llama", DECODER), tokenizer_of(), adapters, SETTINGS)
        expected = worker.answer([Question("verse", "w9 w10", 8)])[0]
        status, body = run.post({"adapter": "verse", "prompt": "w9 w10", "max_new_tokens": 8}, "/generate")
        assert status == 200 and json.loads(body) == expected
        status, body = run.post({"adapter": "verse", "prompt": "w6 " * 60, "max_new_tokens": 6}, "/generate")
        assert status == 422 and "6 new ones" in body
        for count in (0, 257, True, 5.0, "5"):
            assert run.post({"prompt": "w6", "max_new_tokens": count}, "/generate")[0] == 422
        maps = Path(f"/proc/{run.process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()


def test_every_setting_is_an_option():
    parser = example.argparse.ArgumentParser()
    Settings.add_to(parser)
    assert Settings.of(parser.parse_args([])) == Settings()
    changed = Settings.of(parser.parse_args(["--max-batch", "2", "--one-adapter-a-batch"]))
    assert changed == Settings(max_batch=2, one_adapter_a_batch=True)
