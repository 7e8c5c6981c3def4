"""Publish an adapter and load it again, through a Hub on loopback; the model card; PEFT without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
import transformers
from hub_server import TOKEN, serve
from huggingface_hub import ModelCard
from packaging import version
from peft import LoraConfig, get_peft_model

from prefix_adapter import PrefixTuningV2Config, push_to_hub

TESTS = Path(__file__).parents[1]
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
HEADING = "## Load this adapter"

# PEFT uses a deprecated name of transformers, and looks for the vocabulary of a base model that does not exist.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in user/base"),
]

# All three parts run in one process, which has uploaded the adapters but not downloaded them before it loads them.
COMMON = """
import sys
import tiny, torch, transformers
import prefix_adapter
from huggingface_hub import HfApi
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
torch.set_num_threads(1)
load = lambda: transformers.AutoModelForSequenceClassification.from_pretrained("user/base").eval()
def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.ids()).logits
"""
PUBLISH = """
tiny.model("bert", "AutoModelForSequenceClassification").push_to_hub("user/base")
card = b"---\\nlicense: apache-2.0\\n---\\n"
HfApi().upload_file(repo_id="user/base", path_in_repo="README.md", path_or_fileobj=card)
HfApi().hf_hub_download("user/base", "README.md")  # a licence is read from the cache alone
config = prefix_adapter.PrefixTuningV2Config(num_virtual_tokens=5, prefix_projection=True, task_type="SEQ_CLS")
model = get_peft_model(load(), config)
tiny.randomize(model)
model.push_to_hub("user/pushed")
prefix_adapter.push_to_hub(model, "user/ours", commit_message="first")
model.save_pretrained("saved")
HfApi().create_repo("user/uploaded")
HfApi().upload_folder(repo_id="user/uploaded", folder_path="saved")
# Once more, over a card that has our section by now.
model.push_to_hub("user/uploaded")
card = "---\\nlicense: mit\\ntags: [mine]\\n---\\n\\n# My adapter\\n\\nWords of mine.\\n"
for name in ("user/edited", "user/kept"):
    HfApi().create_repo(name)
    HfApi().upload_file(repo_id=name, path_in_repo="README.md", path_or_fileobj=card.encode())
model.push_to_hub("user/edited")
prefix_adapter.push_to_hub(model, "user/kept")
torch.save({"base": logits(load()), "adapter": logits(model)}, "published.pt")
words = prefix_adapter.PTuningConfig(num_virtual_tokens=1, placeholder_token_ids=[int(tiny.ids()[0, 0])])
given = tiny.ids()[:1]
both = get_peft_model(model, words, "second").eval()
prefix_adapter.push_to_hub(both, "user/both")
try:
    both.push_to_hub("user/refused")
except ValueError as error:
    assert "`prefix_adapter.push_to_hub(model, ...)` uploads the adapters of both" in str(error), error
else:
    raise AssertionError
"""
LOAD = """
first = PeftModel.from_pretrained(load(), "user/both").eval()
with torch.no_grad():
    alone = first(given).logits
    again = PeftModel.from_pretrained(first, "user/both", "second", subfolder="second").eval()(given).logits
    assert torch.equal(again, both(given).logits) and not torch.equal(again, alone)
read = prefix_adapter.PeftConfig.from_pretrained("user/pushed")
assert type(read) is prefix_adapter.PrefixTuningV2Config, type(read)
assert (read.num_virtual_tokens, read.prefix_projection) == (5, True), read
assert read.base_model_name_or_path == "user/base", read
torch.save({
    "PeftModel": logits(PeftModel.from_pretrained(load(), "user/ours")),
    "AutoPeftModel": logits(AutoPeftModelForSequenceClassification.from_pretrained("user/uploaded")),
    "transformers": logits(transformers.AutoModelForSequenceClassification.from_pretrained("user/pushed")),
}, "loaded.pt")
"""


def python(code, folder, **environment):
    """Run `code` in a new process, with its own Hub cache and settings."""
    search_path = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path), "HF_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with a published adapter, and the outputs before publishing and after loading."""
    with serve() as hub:
        network = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        network |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        folder = tmp_path_factory.mktemp("hub")
        done = python(COMMON + PUBLISH + LOAD, folder, **network)
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.unknown == []
        answers = {name: torch.load(folder / f"{name}.pt") for name in ("published", "loaded")}
        yield SimpleNamespace(repos=hub.repos, commits=hub.commits, **answers)


def card_of(repository):
    return ModelCard(repository["README.md"].decode())


def test_uploaded_files(published):
    for name in ("user/pushed", "user/ours", "user/uploaded"):
        assert published.repos[name].keys() == ADAPTER_FILES
    assert published.commits["user/pushed"] == [ADAPTER_FILES]
    # The MLP and the head, without the backbone.
    prefix = 5 * 32 + (32 + 1) * 32 + (32 + 1) * tiny.LAYERS * 2 * tiny.HIDDEN
    values = prefix + (tiny.HIDDEN + 1) * 3
    assert 4 * values < len(published.repos["user/pushed"]["adapter_model.safetensors"]) < 4 * values + 2000


def test_the_adapters_of_two_models_are_uploaded(published):
    """LOAD has loaded both. What names no base model has is not uploaded."""
    own = ADAPTER_FILES | {f"second/{name}" for name in ADAPTER_FILES}
    assert published.repos["user/both"].keys() == own
    assert not published.repos["user/refused"]


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel", "transformers"])
def test_loading_from_the_hub_is_exact(published, way):
    if way == "transformers" and version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip("transformers' own load_adapter reads no task heads before 5.18")
    assert (published.published["adapter"] - published.published["base"]).abs().max() > 0.1
    assert torch.equal(published.loaded[way], published.published["adapter"])


@pytest.mark.parametrize("name", ["user/pushed", "user/ours", "user/uploaded", "user/edited", "user/kept"])
def test_card_on_the_hub(published, name):
    card = card_of(published.repos[name])
    assert card.text.count(HEADING) == 1 and "import prefix_adapter\n" in card.text
    assert card.data.library_name == "peft" and card.data.base_model == "user/base"
    assert {"prefix-adapter", "base_model:adapter:user/base"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text and "automatically generated" not in card.text
    edited = name in ("user/edited", "user/kept")
    assert card.data.license == ("mit" if edited else "apache-2.0") and ("mine" in card.data.tags) == edited
    # The rest is the same, whoever uploads it.
    expected = card_of(published.repos["user/ours"]).text
    if edited:
        words, title = "\n# My adapter\n\nWords of mine.\n", expected[expected.index("# P-") : expected.index("A P-")]
        expected = words + expected.replace(title, "")
    assert card.text == expected


@pytest.mark.parametrize("name", ["README.md", "notes/more.txt"])
def test_a_link_out_of_the_folder_is_not_uploaded(name, tmp_path):
    """A link in a stranger's folder may point to a secret."""
    save(tmp_path / "adapter", PrefixTuningV2Config(task_type="SEQ_CLS"))
    (tmp_path / "secret").write_text("secret")
    link = tmp_path / "adapter" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside of the adapter's folder"):
        push_to_hub(tmp_path / "adapter", "user/stolen")


def test_two_adapters_of_one_name_are_not_uploaded():
    inner = get_peft_model(tiny.model("bert"), LoraConfig(r=2, target_modules=["query"]))
    model = get_peft_model(inner, PrefixTuningV2Config(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="'default' is the name of an adapter of this PEFT model, and of one of the"):
        push_to_hub(model, "user/twice")


# ---- The card in a folder


def save(folder, config, kind="bert", auto_class="AutoModelForSequenceClassification"):
    model = get_peft_model(tiny.model(kind, auto_class, name_or_path="user/base"), config)
    model.save_pretrained(folder)
    return model, ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    "kind, task",
    [("bert", "SequenceClassification"), ("llama", "CausalLM"), ("t5", "Seq2SeqLM")],
)
def test_card_keeps_what_peft_writes(kind, task, tmp_path):
    task_type = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}[task]
    auto_class = f"AutoModelFor{task}"
    _, card = save(tmp_path / "ours", PrefixTuningV2Config(task_type=task_type), kind, auto_class)
    _, other = save(tmp_path / "lora", LoraConfig(task_type=task_type), kind, auto_class)
    ours, theirs = card.data.to_dict(), other.data.to_dict()
    assert set(ours.pop("tags")) == set(theirs.pop("tags")) - {"lora"} | {"prefix-adapter"}
    assert ours == theirs and theirs["base_model"] == "user/base"
    assert "### Framework versions" in card.text and f"- PEFT {peft.__version__}" in card.text
    assert f"from peft import AutoPeftModelFor{task}" in card.text
    assert card.text.index("import prefix_adapter") < card.text.index(f"AutoPeftModelFor{task}.from_pretrained")


def test_card_is_not_written_twice_and_keeps_what_a_user_wrote(tmp_path):
    model, card = save(tmp_path, PrefixTuningV2Config(task_type="SEQ_CLS"))
    path = tmp_path / "README.md"
    card.text += "\n## Results\n\n0.93 on my data.\n"
    card.data.license = "apache-2.0"
    card.save(path)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = ModelCard.load(path)
        assert again.text.count(HEADING) == 1
        assert "\n## Results\n\n0.93 on my data.\n" in again.text + "\n"
        assert again.data.license == "apache-2.0"


def test_card_keeps_our_tag_when_saved_again(tmp_path):
    # PEFT replaces all tags each time.
    model, _ = save(tmp_path, PrefixTuningV2Config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "prefix-adapter" in ModelCard.load(tmp_path / "README.md").data.tags


def test_card_follows_the_adapter_that_is_saved_over_another(tmp_path):
    save(tmp_path, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=5))
    _, card = save(
        tmp_path, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=7), "llama", "AutoModelForCausalLM"
    )
    assert card.text.count(HEADING) == 1
    assert "7 virtual tokens" in card.text and "5 virtual tokens" not in card.text
    assert "AutoPeftModelForCausalLM" in card.text and "SequenceClassification" not in card.text


def test_second_adapters_folder_has_a_card(tmp_path):
    model, _ = save(tmp_path, PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=5))
    model.add_adapter("second", PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=7))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert HEADING in card.text and "7 virtual tokens" in card.text and "prefix-adapter" in card.data.tags


# ---- Without this package


@pytest.mark.slow
def test_without_the_import_an_error_names_the_type(tmp_path):
    _, card = save(tmp_path / "adapter", PrefixTuningV2Config(task_type="SEQ_CLS"))
    done = python(
        "import tiny, sys\n"
        "from peft import PeftModel\n"
        "base = tiny.model('bert', 'AutoModelForSequenceClassification')\n"
        "assert 'prefix_adapter' not in sys.modules\n"
        "PeftModel.from_pretrained(base, 'adapter')",
        tmp_path,
    )
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "PREFIX_TUNING_V2" in message, done.stderr[-2000:]
    # The card quotes the error, so that people find it.
    assert message in card.text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING_V2"
