"""The model card: what it has, what it leaves out, and names that try to break it. Read by other Markdown parsers."""

import re

import pytest
import tiny
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model

import prefix_adapter
from prefix_adapter import PrefixTuningV2Config
from prefix_adapter.files.card import PLACE, OwnCard, find_license, merge, new_card, without_template
from prefix_adapter.files.markdown import code, file_name, hub_name, table, without_paths

# PEFT uses a deprecated name of transformers, and looks for the vocabulary of a base model that does not exist.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]
HOSTILE = [
    "a|b", "`", "``x` y", "<script>alert(1)</script>", "<!-- prefix-adapter: end of adapter -->", "[a](javascript:b)",
    "**bold** _x_", "end\\", "\\|", " space ", "| --- |", "&lt;",
]  # fmt: skip
CONTROL = ["a\nb", "\x1b[2J", "\r\n---\r\n", "\u202eabc", "\x00"]


def saved_base(folder, kind="bert", auto_class="AutoModelForSequenceClassification", labels=None):
    """A tiny model, saved to a folder and loaded from there, so that its name is a path."""
    base = tiny.model(kind, auto_class)
    if labels is not None:
        base.config.id2label = dict(enumerate(labels))
        base.config.label2id = {label: index for index, label in enumerate(labels)}
    base.save_pretrained(folder / "base")
    return type(base).from_pretrained(folder / "base")


def tokens_of(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


# ---- The template of huggingface_hub


def test_an_empty_template_leaves_nothing():
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
        "This model card has been automatically generated."
    )
    for template in (
        ModelCard.from_template(ModelCardData()),
        ModelCard.from_template(ModelCardData(tags=[]), model_description=description),
    ):
        assert len(template.text) > 3000
        assert without_template(template.text).strip() == ""
        assert without_template(template.text + "\n### Framework versions\n\n- PEFT 0.21.0\n").strip() == ""


def test_what_a_user_wrote_into_the_template_stays():
    text = ModelCard.from_template(
        ModelCardData(license="mit"), direct_use="For *my* users.\n\n\n```\n# a comment\n```", developers="Me"
    ).text
    text += "\n## Thanks\n\n[More Information Needed] said somebody.\n"
    left = without_template(text)
    headings = [line for line in left.splitlines() if line.startswith("#")]
    assert headings == [
        "## Model Details", "### Model Description", "## Uses", "### Direct Use", "# a comment", "## Thanks",
    ]  # fmt: skip
    for words in ("- **Developed by:** Me", "- **License:** mit", "For *my* users.\n", "Needed] said somebody.\n"):
        assert words in left
    assert left.count("More Information Needed") == 1 and "<!--" not in left


@pytest.mark.parametrize("text", ["", "Words.\n", "# Title\n\n## Evaluation\n\nGood.\n", "a\r\n\r\n## B\r\n\r\nc\r\n"])
def test_a_text_without_the_template_is_not_touched(text):
    assert without_template(text) == text


# ---- Parts


def test_parts_are_replaced_in_their_places_and_the_rest_stays():
    card = new_card()
    merge(card, OwnCard("Title", {"tags": ["a"]}, {"one": "first", "two": "second"}))
    place = card.text.index("<!-- prefix-adapter: two")
    card.text = f"Before.\n{card.text[:place]}Between.\n\n{card.text[place:]}\nAfter.\n"
    merge(card, OwnCard("Other", {"tags": ["b"], "license": "mit"}, {"one": "third \\1"}))
    lines = [line for line in card.text.splitlines() if line and not line.startswith("<!--")]
    assert lines == ["Before.", "# Other", "third \\1", "Between.", "second", "After."]
    assert card.data.tags == ["a", "b"] and card.data.license == "mit"
    # A part without its end is the user's text from now on: nothing of it is lost.
    card.text = card.text.replace("<!-- prefix-adapter: end of one -->", "")
    for number in ("fourth", "fifth", "sixth"):
        merge(card, OwnCard("Other", {"tags": []}, {"one": number}))
        assert "third" in card.text and "Between.\n" in card.text and card.text.count("\n# ") == 1
        assert [word for word in ("fourth", "fifth", "sixth") if word in card.text] == [number]


def test_metadata_of_a_user_stays():
    card = ModelCard("---\npipeline_tag: text-ranking\ndatasets: [a]\nlanguage: de\n---\n\n    code\n\nWords.\n")
    merge(card, OwnCard("T", {"tags": ["x"], "pipeline_tag": "text-generation", "datasets": ["b"]}, {"one": "1"}))
    assert card.data.to_dict() == {
        "pipeline_tag": "text-ranking", "datasets": ["a", "b"], "language": "de", "tags": ["x"],
    }  # fmt: skip
    assert card.text.startswith("\n    code\n\nWords.\n\n<!--")


def test_a_damaged_card_is_an_error_that_names_it_and_stays(tmp_path):
    path = tmp_path / "README.md"
    for damaged in ("---\na: [\n---\nWords.\n", "---\n- a\n---\n", "---\nmodel-index: 3\n---\n"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"{path} cannot be read as a model card"):
            PrefixTuningV2Config().save_pretrained(tmp_path)
        assert path.read_text() == damaged


# ---- No path of the machine


@pytest.mark.parametrize("kind, auto_class", [("bert", "AutoModelForSequenceClassification"), ("llama", "AutoModel")])
def test_no_path_and_no_empty_section(kind, auto_class, tmp_path):
    task_type = "SEQ_CLS" if kind == "bert" else None
    settings = {"task_type": task_type, "layers_to_transform": [0], "strength": 0.5, "lora_r": 2}
    model = get_peft_model(saved_base(tmp_path, kind, auto_class), PrefixTuningV2Config(**settings))
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text and "`base`" in text
    assert "A P-Tuning v2 prefix of 20 virtual tokens with low-rank matrices of rank 2 for `base`." in text
    assert "| `layers_to_transform` | `[0]` |" in text and "| `strength` | `0.5` |" in text
    assert "More Information Needed" not in text
    tokens = tokens_of(ModelCard(text).text)
    for here, after in zip(tokens, [*tokens[1:], None], strict=True):
        if here.type == "heading_close":  # a heading is followed by text, or by a heading below it
            assert after is not None and after.type != "heading_open", text
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == text


def test_a_folder_of_named_adapters(tmp_path):
    model = get_peft_model(saved_base(tmp_path), PrefixTuningV2Config(task_type="SEQ_CLS"), "first")
    model.add_adapter("second", PrefixTuningV2Config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapters")
    text = (tmp_path / "adapters" / "README.md").read_text()
    assert str(tmp_path) not in text and "More Information Needed" not in text
    assert "`first`, `second`" in text


# ---- The code in the card


@pytest.mark.parametrize(
    ("kind", "auto_class", "task_type", "peft_class"),
    [
        ("bert", "AutoModelForSequenceClassification", "SEQ_CLS", AutoPeftModelForSequenceClassification),
        ("llama", "AutoModelForCausalLM", "CAUSAL_LM", AutoPeftModelForCausalLM),
        ("bert", "AutoModel", None, PeftModel),
    ],
)
def test_the_code_in_the_card_loads_the_adapter(kind, auto_class, task_type, peft_class, tmp_path):
    config = PrefixTuningV2Config(task_type=task_type, num_virtual_tokens=3, prefix_projection=True)
    model = get_peft_model(saved_base(tmp_path, kind, auto_class), config)
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    fences = [t for t in tokens_of((tmp_path / "adapter" / "README.md").read_text()) if t.type == "fence"]
    python = next(token.content for token in fences if token.info == "python")
    names = {}
    exec(python.replace(PLACE, str(tmp_path / "adapter")), names)
    expected, found = (next(iter(m.eval()(tiny.ids()).values())) for m in (model, names["model"]))
    assert (expected == found).all()
    assert f'prefix-adapter fold "{PLACE}" folded\n' in [token.content for token in fences]


# ---- Names that try to break the card


@pytest.mark.parametrize("text", HOSTILE)
def test_code_shows_a_text_as_it_is(text):
    (paragraph,) = [token for token in tokens_of(f"x {code(text)} y") if token.type == "inline"]
    assert [token.type for token in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content == text
    cells = [token for token in tokens_of(table(["a", "b"], [[code(text), "c"]])) if token.type == "inline"]
    assert [cell.content for cell in cells[:2]] == ["a", "b"] and len(cells) == 4 and cells[3].content == "c"
    assert [token.content for token in cells[2].children] == [text]


@pytest.mark.parametrize("text", CONTROL)
def test_control_characters_are_escaped(text):
    assert code(text).isprintable() and MarkdownIt().render(code(text)).count("<code>") == 1


def test_hostile_labels_and_names(tmp_path):
    folder = tmp_path / "base `x` <b>"
    base = saved_base(folder, labels=[*HOSTILE[:2], HOSTILE[4]])
    config = PrefixTuningV2Config(task_type="SEQ_CLS", label_names=[*HOSTILE[:2], HOSTILE[4]])
    model = get_peft_model(base, config)
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert str(tmp_path) not in card.content
        text = MarkdownIt("commonmark").enable("table").parse(card.text)
        found = [child.content for token in text for child in token.children or () if child.type == "code_inline"]
        assert set(config.label_names) <= set(found)
        assert len([token for token in text if token.type == "html_block"]) == 2
    with pytest.raises(ValueError, match="control characters"):
        PrefixTuningV2Config(label_names=["a\x1b[2J"])


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "local").mkdir()
    assert hub_name("user/model") == "user/model" and hub_name("bert-base-cased") == "bert-base-cased"
    for path in ("user/local", "/data/model", "C:\\models\\x", "../x", "~/x", "a/b/c", "x y", "", None, 3):
        assert hub_name(path) is None
    assert {file_name(path) for path in ("/data/m", "C:\\data\\m", "m/", "m", "~/m")} == {"m"}
    assert without_paths({"a": ["/data/m", "C:\\data\\m", "user/local", "user/model", r".*\.q", 1]}) == {
        "a": ["m", "m", "local", "user/model", r".*\.q", 1]
    }


# ---- The licence of the base model


def test_licence_of_a_base_model_in_a_folder(tmp_path):
    base = saved_base(tmp_path)
    card = tmp_path / "base" / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE\n---\n")
    model = get_peft_model(base, PrefixTuningV2Config())
    model.save_pretrained(tmp_path / "adapter")
    found = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (found.data.license, found.data.license_name) == ("other", "my-licence")
    assert found.data.license_link is None  # a file of the base model's repository
    assert "`other`" in found.text
    for damaged in (
        "---\nlicense: [a]\n---\n",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "",
        "[" * 5000,
        "---\nlicense: <b>\n---\n",
    ):
        card.write_text(damaged)
        assert find_license(tmp_path / "base") == {}
    assert find_license("user/unknown") == {} and find_license(tmp_path / "none") == {}


def test_the_licence_of_a_user_stays(tmp_path):
    base = saved_base(tmp_path)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n\nWords.\n")
    get_peft_model(base, PrefixTuningV2Config()).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.license == "mit" and card.text.lstrip().startswith("Words.\n")


# ---- Labels


def test_the_card_names_the_labels_in_their_order(tmp_path):
    labels = [f"name {index}" for index in range(130)]
    PrefixTuningV2Config(label_names=labels).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    listed = re.search(r"The head has 130 labels, in this order: (.*) and 30 more\.", text)[1]
    assert listed == ", ".join(f"`{label}`" for label in labels[:100])
    assert prefix_adapter.PeftConfig.from_pretrained(str(tmp_path)).label_names == labels
