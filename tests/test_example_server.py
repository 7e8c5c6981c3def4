"""The example server: answers are those of the adapter that was asked for, and mistakes are answered with 4xx."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefix_adapter import PrefixTuningV2Config

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "server"))
import app as example  # noqa: E402
from worker import Question, Worker  # noqa: E402

CLASSIFIER, DECODER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
LABELS = {"two": 2, "three": 3, "seven": 7}


def tokenizer_of():
    words = {"[PAD]": 0, "[EOS]": 2, **{f"w{i}": i for i in range(5, tiny.VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w5"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, labels in LABELS.items():
        model = get_peft_model(
            tiny.model("bert", CLASSIFIER, num_labels=labels),
            PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=labels),
        )
        tiny.randomize(model, seed=labels)
        model.save_pretrained(root / name)
        if name != "three":
            (root / name / "recipe.yaml").write_text(f"labels: {[f'{name} {i}' for i in range(labels)]}")
    for seed, name in enumerate(("prose", "verse")):
        model = get_peft_model(tiny.model("llama", DECODER), PrefixTuningV2Config(task_type="CAUSAL_LM"))
        tiny.randomize(model, seed=seed)
        model.save_pretrained(root / name)
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text((root / "two" / "adapter_config.json").read_text())
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"no such thing")
    return root


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, model in (("bert", tiny.model("bert", CLASSIFIER)), ("llama", tiny.model("llama", DECODER))):
        model.save_pretrained(root / name)
        tokenizer_of().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=[True, False], ids=["mixed", "one-adapter"])
def client(adapters, bases, request):
    services = {
        "classifier": example.Service("classify", str(bases / "bert"), adapters, mixed=request.param, threads=1),
        "generator": example.Service("generate", str(bases / "llama"), adapters, mixed=request.param, threads=1),
    }
    with TestClient(example.create_app(**services)) as client:
        client.services = services
        yield client


def test_many_at_once(client, adapters):
    texts = [f"w{7 + i} w{9 + i} w{11 + 2 * i}" + " w50" * (i % 4) for i in range(24)]
    names = [[*LABELS, None][i % 4] for i in range(24)]
    with ThreadPoolExecutor(24) as threads:
        bodies = [{"adapter": name, "text": text} for name, text in zip(names, texts, strict=True)]
        answers = list(threads.map(lambda body: client.post("/classify", json=body).json(), bodies))
    for name, text, answer in zip(names, texts, answers, strict=True):
        model = tiny.model("bert", CLASSIFIER, num_labels=LABELS.get(name, 3))
        model = PeftModel.from_pretrained(model, adapters / name).eval() if name else model
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokenizer_of()(text)["input_ids"]])).logits[0].softmax(-1)
        best = expected.argmax().item()
        assert answer["label"] == (f"{name} {best}" if name in ("two", "seven") else best)
        assert answer["probability"] == pytest.approx(expected[best].item(), abs=1e-5)


def test_generate(client, adapters):
    requests = [("prose", "w6 w7 w8", 5), ("verse", "w9", 8), (None, "w10 w11", 3)]
    with ThreadPoolExecutor(3) as threads:
        bodies = [{"adapter": name, "prompt": text, "max_new_tokens": count} for name, text, count in requests]
        answers = list(threads.map(lambda body: client.post("/generate", json=body).json(), bodies))
    for (name, text, count), answer in zip(requests, answers, strict=True):
        model = tiny.model("llama", DECODER)
        model = PeftModel.from_pretrained(model, adapters / name).eval() if name else model
        ids = torch.tensor([tokenizer_of()(text)["input_ids"]])
        tokens = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        assert answer["text"] == tokenizer_of().decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/classify", {"adapter": "nothing", "text": "w6"}, 404, "no adapter 'nothing'"),
        ("/classify", {"adapter": "../adapters/two", "text": "w6"}, 404, "no adapter"),
        ("/classify", {"adapter": "..", "text": "w6"}, 404, "no adapter"),
        ("/classify", {"adapter": "broken", "text": "w6"}, 422, "is damaged"),
        ("/classify", {"adapter": "prose", "text": "w6"}, 422, "cannot be used"),
        ("/classify", {"text": ""}, 422, "at least 1 character"),
        ("/classify", {"text": " "}, 422, "0 tokens"),
        ("/classify", {"text": "w6 " * 65}, 422, "65 tokens"),
        ("/classify", {"adapter": 7, "text": "w6"}, 422, "valid string"),
        ("/classify", {}, 422, "Field required"),
        ("/generate", {"prompt": "w6", "max_new_tokens": 0}, 422, "greater than or equal to 1"),
        ("/generate", {"prompt": "w6 " * 60, "max_new_tokens": 6}, 422, "6 new ones"),
    ],
)
def test_mistakes(client, path, body, status, words):
    client.post("/classify", json={"adapter": "two", "text": "w6"})
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert words in answer.text
    assert client.post("/classify", json={"adapter": "two", "text": "w6"}).status_code == 200


def test_too_many(client, monkeypatch):
    monkeypatch.setattr(example, "MAX_WAITING", 0)
    answer = client.post("/classify", json={"text": "w6"})
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"


def test_one_row_that_fails_fails_alone(adapters):
    worker = Worker("classify", tiny.model("bert", CLASSIFIER), tokenizer_of())

    def fails(batch):
        if any(each.input_ids == [13] for each in batch):
            raise RuntimeError("thirteen")
        return worker.classify(batch)

    worker.compute = fails
    answers = worker.answer([Question(str(adapters / "two"), [number]) for number in range(10, 18)])
    assert answers[3] == {"error": "RuntimeError: thirteen"}
    assert all("label" in answer for number, answer in enumerate(answers) if number != 3)


def test_a_process_that_ends_is_followed_by_another(client):
    """Those who wait get a sentence, and those who come later an answer."""
    client.post("/generate", json={"adapter": "prose", "prompt": "w6"})
    before = client.post("/generate", json={"adapter": "verse", "prompt": "w6"}).json()
    client.services["generator"].process.submit(os._exit, 1)
    lost = client.post("/generate", json={"adapter": "verse", "prompt": "w6"})
    assert lost.status_code == 503 and "has ended" in lost.text and "Retry-After" in lost.headers
    for _ in range(100):
        answer = client.post("/generate", json={"adapter": "verse", "prompt": "w6"})
        if answer.status_code == 200:
            break
        time.sleep(0.3)
    assert answer.json() == before


def test_a_base_model_that_cannot_be_loaded(adapters, bases, tmp_path):
    """The server does not start; it would answer nothing."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (bases / "bert").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no such thing")
    app = example.create_app(example.Service("classify", str(broken), adapters, threads=1))
    with pytest.raises(fastapi.HTTPException, match="has ended"), TestClient(app):
        pass


def test_adapters_and_metrics(client):
    for name in LABELS:
        client.post("/classify", json={"adapter": name, "text": "w6"})
    found = client.get("/adapters").json()["classify"]
    assert found["on_disk"] == sorted([*LABELS, "broken", "prose", "verse"])
    assert found["loaded"].keys() == LABELS.keys()
    metrics = client.get("/metrics").text
    assert 'adapters{service="classify"} 3.0' in metrics
    assert 'requests_total{path="/classify",status="200"}' in metrics
