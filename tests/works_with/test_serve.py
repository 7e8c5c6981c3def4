"""`prefix-adapter serve`: the real OpenAI client gets the texts of `generate` from a base model and its adapters."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import transformers as tr
from peft import PeftModel

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.cli import main

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
serving = pytest.importorskip("prefix_adapter.adapters.serving", exc_type=ImportError)

NEW = 8
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)
SETTINGS = {
    "one": {"num_virtual_tokens": 3},
    "v2.two": {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 8},
    "three": {"num_virtual_tokens": 2, "lora_r": 2, "shift_positions": True},
}
CHATS = [[{"role": "user", "content": text}] for text in ("w3 w4 w5", "w9", "w20 w21 w22 w23 w24 w25 w26")]
CHATS.append([*CHATS[0], {"role": "assistant", "content": "w7 w8"}, {"role": "user", "content": "w40"}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model with a chat template, and three adapters."""
    root = tmp_path_factory.mktemp("served")
    words = ["A", "B", *(f"w{i}" for i in range(tiny.VOCAB - 8))]  # A and B are the labels of decisions
    base = tiny.save(root / "base", "llama", words, "AutoModelForCausalLM", max_position_embeddings=256)
    tokenizer = tr.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = tr.AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, PrefixTuningV2Config(task_type="CAUSAL_LM", **settings))
        tiny.randomize(model, 1.0, seed=seed)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, list[str]]:
    """The texts of `generate`, by model: an answer to each chat, then one to its last message as a plain prompt."""
    tokenizer, base = tr.AutoTokenizer.from_pretrained(folder / "base"), str(folder / "base")
    texts = {}
    for name in (base, *SETTINGS):
        model = tr.AutoModelForCausalLM.from_pretrained(base)
        if name != base:
            model = PeftModel.from_pretrained(model, folder / name)
        inputs = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            for chat in CHATS
        ]
        inputs += [tokenizer(chat[-1]["content"], return_tensors="pt") for chat in CHATS]
        texts[name] = [
            tokenizer.decode(
                model.eval().generate(**each, max_new_tokens=NEW, do_sample=False)[0, each["input_ids"].shape[1] :],
                skip_special_tokens=True,
            )
            for each in inputs
        ]
    return texts


def start(command: list[str], monkeypatch) -> tuple[threading.Thread, uvicorn.Server]:
    """The server that a command starts, on a free port of this machine."""
    servers = []

    def run(app, host, port):
        servers.append(uvicorn.Server(uvicorn.Config(app, host=host, port=0, log_level="warning")))
        servers[0].run()

    monkeypatch.setattr(serving.uvicorn, "run", run)
    thread = threading.Thread(target=main, args=(command,), daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        time.sleep(0.05)
    return thread, servers[0]


@pytest.fixture(scope="module", params=[[], ["--continuous_batching", "--num_blocks", "64"]], ids=["", "continuous"])
def client(folder, request):
    adapters = [f"{name}={folder / name}" for name in SETTINGS]
    command = ["serve", str(folder / "base"), *adapters, "--host", "127.0.0.1", "--device", "cpu", *request.param]
    with pytest.MonkeyPatch.context() as monkeypatch:
        thread, server = start(command, monkeypatch)
        port = server.servers[0].sockets[0].getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as found:
            yield found
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def chat(client, name: str, messages, stream: bool = False) -> str:
    answer = client.chat.completions.create(
        model=name, messages=messages, max_tokens=NEW, temperature=0, stream=stream
    )
    if stream:
        return "".join(part.choices[0].delta.content or "" for part in answer)
    assert answer.model == name and answer.usage.completion_tokens <= NEW
    return answer.choices[0].message.content


def test_the_models_are_listed(client, expected):
    assert {model.id for model in client.models.list()} == set(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_chats_one_after_the_other(client, expected, stream):
    for name, texts in expected.items():
        assert [chat(client, name, messages, stream) for messages in CHATS] == texts[: len(CHATS)]
    assert len({tuple(texts) for texts in expected.values()}) == len(expected)


def test_chats_with_all_models_at_the_same_time(client, expected):
    jobs = [(name, place, place % 2 == 0) for place in range(len(CHATS)) for name in expected] * 2
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: chat(client, job[0], CHATS[job[1]], job[2]), jobs))
    assert found == [expected[name][place] for name, place, _ in jobs]


def test_completions(client, expected):
    for name, texts in expected.items():
        for messages, text in zip(CHATS, texts[len(CHATS) :], strict=True):
            settings = {"model": name, "prompt": messages[-1]["content"], "max_tokens": NEW, "temperature": 0}
            assert client.completions.create(**settings).choices[0].text == text
            parts = client.completions.create(**settings, stream=True)
            assert "".join(part.choices[0].text for part in parts) == text


def test_responses(client, expected):
    for name, texts in expected.items():
        settings = {"model": name, "input": CHATS[0][0]["content"], "max_output_tokens": NEW, "temperature": 0}
        answer = client.responses.create(**settings)
        assert answer.output_text == texts[0]
        parts = client.responses.create(**settings, stream=True)
        assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == texts[0]


def test_decisions(client, folder, expected):
    """The server's own endpoint for questions with given answers: the same pipeline, with the adapter active."""
    questions = {"tone": {"type": "choice", "instructions": "w5 w6", "criteria": {"w3": "w30", "w9": None}}}
    tokenizer, answers = tr.AutoTokenizer.from_pretrained(folder / "base"), []
    for name in expected:
        model = tr.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        if name in SETTINGS:
            PeftModel.from_pretrained(model, folder / name)
        pipeline = tr.DecisionPipeline(model=model, tokenizer=tokenizer)
        request = {"model": name, "state": "w3 w4", "questions": questions}
        answers.append(client.post("/systemone", body=request, cast_to=dict)["answers"])
        assert answers[-1] == pipeline({"state": "w3 w4", "questions": questions}), name
    assert len({str(answer) for answer in answers}) == len(expected)


def test_a_model_that_is_not_served(client, folder, expected):
    for name in ("four", str(folder / "one"), "hf-internal-testing/tiny-random-gpt2", "one@main", "one:a.gguf"):
        with pytest.raises(openai.NotFoundError) as caught:
            chat(client, name, CHATS[0])
        assert caught.value.code == "model_not_found"
        assert all(known in caught.value.body["message"] for known in expected)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "w3"}, "`messages` must be a list"),
        ({"model": None}, "`model` must be"),
        ({"max_tokens": -3}, "`max_tokens` must be a number of one or more tokens"),
        ({"max_tokens": "8"}, "`max_tokens` must be a number of one or more tokens"),
        ({"temperature": "hot"}, "hot"),
        ({"messages": [{"role": "user", "content": 3.5}]}, ""),
    ],
)
def test_wrong_requests(client, expected, wrong, reason):
    """The client hears the reason, and its connection serves the next request."""
    body = {"model": "one", "messages": CHATS[0], "max_tokens": NEW, "temperature": 0}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={**body, **wrong}, cast_to=dict)
    assert caught.value.type == "invalid_request_error" and reason in caught.value.body["message"]
    assert chat(client, "one", CHATS[0]) == expected["one"][0]


def test_an_empty_prompt(client, expected):
    with pytest.raises(openai.BadRequestError, match="`prompt` is empty"):
        client.completions.create(model="one", prompt="", max_tokens=NEW)
    assert chat(client, "one", CHATS[0]) == expected["one"][0]


def test_what_cannot_be_served(folder, tmp_path, capsys):
    def error_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["serve", str(folder / "base"), *arguments, "--device", "cpu"])
        return capsys.readouterr().err + str(stopped.value)

    assert "'one' is given twice" in error_of("one=x", "one=y")
    assert "NAME=FOLDER" in error_of("one=")
    assert str(tmp_path / "none") in error_of(str(tmp_path / "none"))
    for task, settings in {"SEQ_CLS": {}, "CAUSAL_LM": {"entry_point": "attention"}}.items():
        auto = "AutoModelForCausalLM" if task == "CAUSAL_LM" else "AutoModelForSequenceClassification"
        model = getattr(tr, auto).from_pretrained(folder / "base")
        config = PrefixTuningV2Config(task_type=task, num_virtual_tokens=2, **settings)
        get_peft_model(model, config).save_pretrained(tmp_path / task)
    assert "is an adapter for SEQ_CLS" in error_of(f"one={tmp_path / 'SEQ_CLS'}")
    refused = error_of(f"one={tmp_path / 'CAUSAL_LM'}", "--continuous_batching", "--num_blocks", "64")
    assert "one cannot be served with continuous batching" in refused and "Use `generate`" in refused
    bart = tiny.save(tmp_path / "bart", "bart", ["w1"], "AutoModelForCausalLM")
    with pytest.raises(SystemExit) as stopped:
        main(["serve", bart, "--device", "cpu", "--continuous_batching", "--num_blocks", "64"])
    assert "engine of continuous batching fails with bart" in capsys.readouterr().err + str(stopped.value)
