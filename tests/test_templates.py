"""Templates: parsing, tokens against those of the whole text, virtual tokens, and cutting."""

from pathlib import Path

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefix_adapter.templates import Template, TemplateEncoder, TemplateError

MODELS = Path(__file__).resolve().parents[2] / "models"
TEXTS = [
    "A man, a plan. Question: Is it so? Answer: Yes.",
    "It is so, they say: no man is an island. Maybe yes, maybe no?",
    "그는 집에 갔다. 정말로 그렇다면 예, 아니요! 아마도 그럴 것이다.",
    "x , . ! ? : ; 0 1 2 Question Answer Yes No Maybe yes",
]
ROW = {"a": "A man, a plan.", "b": "Is it so?"}
RTE = "{a} Question: {b:strip}? Answer: {mask}."


# Real tokenizers of every family, trained on a few sentences.


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT has it."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """As GPT-2 or RoBERTa has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    made.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, mask_token=mask, **names)


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """As T5 or Llama has it: a space is a sign of its own."""
    if kind == "t5":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
        made.train_from_iterator(TEXTS, trainer)
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<extra_id_0>"
        )
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # SentencePiece has no tokens of two words, and few of words with punctuation.
    words = pre_tokenizers.Split("▁", "merged_with_next")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>", "<s>", "</s>"]))
    made.pre_tokenizer = None
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BUILT = {
    "wordpiece": wordpiece,
    "gpt2": lambda: byte_level("gpt2"),
    "roberta": lambda: byte_level("roberta"),
    "t5": lambda: sentencepiece("t5"),
    "llama": lambda: sentencepiece("llama"),
}
REAL = ["e5-small", "smollm2-135m", "gemma3-270m", "minilm"]


@pytest.fixture(scope="module", params=[*BUILT, *REAL])
def tokenizer(request):
    if request.param == "minilm":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("minilm"))
    if request.param in REAL:
        if not (MODELS / request.param).is_dir():
            pytest.skip(f"needs the tokenizer in {MODELS / request.param}, which is not part of the project")
        return AutoTokenizer.from_pretrained(MODELS / request.param)
    return BUILT[request.param]()


# Parsing


def test_parts_of_a_template():
    template = Template("{{x}} {p:2}{a:strip, whole} {p}{p:m} {mask} {sep}{b:cut_start}{p:m}{a}")
    assert template.fields == ("a", "b") and template.whole_fields == ("a",)
    assert template.num_virtual_tokens == 4 and template.has_mask
    virtual = [piece.index for piece in template.pieces if type(piece).__name__ == "VirtualToken"]
    assert virtual == [0, 1, 2, 3, 3]
    assert template.pieces[0].text == "{x} "
    assert not Template("{a}").has_mask and not Template("words").fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not empty"),
        (3, "not empty, got 3"),
        ("a {b", "character 3 .*`{` is not closed"),
        ("a {b {c}", "character 3 .*`{` is not closed"),
        ("a } b", "character 3 .*`}` closes nothing"),
        ("{{a}", "character 4 .*`}` closes nothing"),
        ("a {}", "character 3 .*no name"),
        ("{mask} {mask}", "character 8 .*a second `{mask}`"),
        ("{sep}{sep}", "character 6 .*a second `{sep}`"),
        ("{mask:2}", "character 1 .*`{mask}` has no options, got '2'"),
        ("{p:0}", "character 1 .*number from 1 to 1000, a name, or words in quotation marks, got '0'"),
        ("{p:-1}", "number from 1 to 1000, a name, or words in quotation marks, got '-1'"),
        ("{p:1.5}", "number from 1 to 1000, a name, or words in quotation marks, got '1.5'"),
        ("{p:1001}", "number from 1 to 1000"),
        ("{p:" + "9" * 100_000 + "}", "number from 1 to 1000"),
        ("{p:999}{p:2}", "more than 1000 virtual tokens"),
        ('{p:"It was}', "character 1 .*words between two quotation marks"),
        ('a {p:" "}', "character 3 .*words between two quotation marks"),
        ("{p:a b}", "letters, digits and _ only, got 'a b'"),
        ("{a:big}", "character 1 .*'a' has no option 'big'; there are strip, whole, cut_start"),
        ("{a:whole,cut_start}", "contradict each other"),
    ],
)
def test_bad_templates(text, message):
    with pytest.raises(TemplateError, match=message):
        Template(text)


# Tokens


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (RTE, "A man, a plan. Question: Is it so? Answer: {}."),
        ("{b} {mask}, {a}", "Is it so? {}, A man, a plan."),
        ("{b:strip}\nAnswer:{mask}", "Is it so\nAnswer:{}"),
        ("{mask}: {a}", "{}: A man, a plan."),
        ('"{a}" ({mask}) {b}', '"A man, a plan." ({}) Is it so?'),
        ("{a}  Question  {mask} {b}", "A man, a plan.  Question  {} Is it so?"),
        ("{c} {mask} {c}", "그는 집에 갔다. {} 그는 집에 갔다."),
    ],
)
def test_tokens_are_those_of_the_whole_text(tokenizer, template, text):
    encoder, row = TemplateEncoder(Template(template), tokenizer), {**ROW, "c": "그는 집에 갔다."}
    for word in ("Yes", "No"):
        ids = encoder.word_ids(word)
        (found,) = encoder.encode(row, [ids])
        assert found.input_ids == tokenizer(text.format(word))["input_ids"]
        assert [found.input_ids[i] for i in found.answer] == ids
        assert len(found.token_type_ids) == len(found.input_ids)


def test_several_words_as_an_answer(tokenizer):
    encoder = TemplateEncoder(Template(RTE), tokenizer)
    ids = encoder.word_ids("no man")
    (found,) = encoder.encode(ROW, [ids])
    text = "A man, a plan. Question: Is it so? Answer: no man."
    assert found.input_ids == tokenizer(text)["input_ids"] and len(ids) > 1


def test_pairs_are_those_of_the_tokenizer(tokenizer):
    template = Template("{a} {sep} {b}")
    if tokenizer("x", "x")["input_ids"] in (2 * tokenizer("x", add_special_tokens=False)["input_ids"],) or (
        tokenizer.sep_token is None and tokenizer.mask_token != "<extra_id_0>"
    ):
        with pytest.raises(TemplateError, match="puts nothing between two texts"):
            TemplateEncoder(template, tokenizer)
        return
    (found,) = TemplateEncoder(template, tokenizer).encode(ROW)
    pair = tokenizer(ROW["a"], ROW["b"], return_token_type_ids=True)
    assert (found.input_ids, found.token_type_ids) == (pair["input_ids"], pair["token_type_ids"])


def test_masks_stand_for_words(tokenizer):
    encoder = TemplateEncoder(Template(RTE), tokenizer)
    if tokenizer.mask_token is None:
        with pytest.raises(TemplateError, match="no mask token"):
            encoder.encode(ROW)
        return
    (found,) = encoder.encode(ROW)
    expected = tokenizer("A man, a plan. Question: Is it so? Answer: Yes.")["input_ids"]
    word = encoder.word_ids("Yes")
    start = found.answer.start
    assert expected[start : start + len(word)] == word
    assert found.input_ids == [*expected[:start], tokenizer.mask_token_id, *expected[start + len(word) :]]


def test_virtual_tokens_stand_between_words(tokenizer):
    """Without its virtual tokens, a text has the tokens of the text without them."""
    template = Template("{p:2} {a} Question: {p:x} {b:strip}? {p} Answer: {mask}. {p:x}")
    placeholders = [10**6 + i for i in range(template.num_virtual_tokens)]
    encoder = TemplateEncoder(template, tokenizer, placeholder_token_ids=placeholders)
    (found,) = encoder.encode(ROW, [encoder.word_ids("Yes")])
    virtual = [token for token in found.input_ids if token >= 10**6]
    assert virtual == [10**6, 10**6 + 1, 10**6 + 2, 10**6 + 3, 10**6 + 2]
    rest = [token for token in found.input_ids if token < 10**6]
    start = " " if tokenizer(" A")["input_ids"] != tokenizer("A")["input_ids"] else ""
    assert rest == tokenizer(f"{start}A man, a plan. Question: Is it so? Answer: Yes.")["input_ids"]
    marks = ["A man, a plan. Question:", "A man, a plan. Question: Is it so?"]
    lengths = [len(tokenizer(start + mark, add_special_tokens=False)["input_ids"]) for mark in marks]
    first = len(found.input_ids[: found.input_ids.index(10**6)])
    assert found.input_ids.index(10**6 + 2) == first + 2 + lengths[0]
    assert found.input_ids.index(10**6 + 3) == first + 3 + lengths[1]
    with pytest.raises(TemplateError, match="4 virtual tokens, and there are 3 `placeholder_token_ids`"):
        TemplateEncoder(template, tokenizer, placeholder_token_ids=placeholders[1:])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{a} {p:"Question: Is it so?"} {b}', "A man, a plan. Question: Is it so? Is it so?"),
        ('{p:"Maybe"} {a} {p:"yes"}{mask}', "Maybe A man, a plan. yes"),
        ('{c} {p:"정말로 그렇다면"} {c}', "그는 집에 갔다. 정말로 그렇다면 그는 집에 갔다."),
    ],
)
def test_trainable_words_start_as_the_tokens_of_the_whole_text(tokenizer, template, text):
    parsed, expected = Template(template), tokenizer(text)["input_ids"]
    if tokenizer.unk_token_id in expected:
        with pytest.raises(TemplateError, match="does not know the word"):
            parsed.start_token_ids(tokenizer)
        return
    starts = parsed.start_token_ids(tokenizer)
    encoder = TemplateEncoder(parsed, tokenizer, placeholder_token_ids=range(10**6, 10**6 + len(starts)))
    (found,) = encoder.encode({**ROW, "c": "그는 집에 갔다."}, [[]])
    ids = [starts[token - 10**6] if token >= 10**6 else token for token in found.input_ids]
    assert ids == expected
    virtual = [token for token in found.input_ids if token >= 10**6]
    assert virtual == list(range(10**6, 10**6 + len(starts)))  # the order of the text


def test_vectors_are_numbered_in_the_order_of_the_text(tokenizer):
    template = Template('a {p:x} {p:"yes no"} {p:2} {p:x} {p:"yes"}')
    yes, no = (TemplateEncoder(Template("a {mask}"), tokenizer).word_ids(word) for word in ("yes", "no"))
    starts = template.start_token_ids(tokenizer)
    assert starts[0] is None and starts[-len(yes) - 2 : -len(yes)] == [None, None] and starts[-len(yes) :] == yes
    assert len(starts) == 3 + 2 * len(yes) + len(no) and template.num_virtual_tokens == 3
    encoder = TemplateEncoder(template, tokenizer, placeholder_token_ids=range(10**6, 10**6 + len(starts)))
    (found,) = encoder.encode({})
    places = [token - 10**6 for token in found.input_ids if token >= 10**6]
    assert places == [*range(len(starts) - len(yes)), 0, *range(len(starts) - len(yes), len(starts))]


def test_a_text_beside_a_virtual_token_begins_a_word(tokenizer):
    encoder = TemplateEncoder(Template("Question:{p:x}{a}{p:x} Answer"), tokenizer, placeholder_token_ids=[10**6])
    ids = encoder.encode({"a": "man"})[0].input_ids
    first = ids.index(10**6)
    between = ids[first + 1 : ids.index(10**6, first + 1)]
    alone = tokenizer(",man", add_special_tokens=False)["input_ids"]
    assert between == alone[len(alone) - len(between) :] and between


def test_without_the_end_of_the_text():
    encoder = TemplateEncoder(Template("{a} {mask}"), wordpiece(), add_end=False)
    ids = encoder.encode(ROW)[0].input_ids
    assert ids[0] == encoder.tokenizer.cls_token_id and ids[-1] == encoder.tokenizer.mask_token_id


# Cutting


def plain(tmp_path):
    words = [f"w{i}" for i in range(80)]
    return AutoTokenizer.from_pretrained(tiny.save(tmp_path / "base", "bert", words))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a} w50 {b} w51 {mask}", "w0 w1 w50 w10 w11 w12 w51 ?"),
        ("{a:cut_start} w50 {b} w51 {mask}", "w4 w5 w50 w10 w11 w12 w51 ?"),
        ("{a} w50 {b:whole} w51 {mask}", "w0 w1 w50 w10 w11 w12 w51 ?"),
        ("{a:whole} {b} {mask}", "w0 w1 w2 w3 w4 w5 w10 ?"),
        ("{a} w50 {b:whole} {b} {mask}", "w0 w50 w10 w11 w12 w10 w11 ?"),
    ],
)
def test_which_field_is_cut(template, expected, tmp_path):
    tokenizer = plain(tmp_path)
    encoder = TemplateEncoder(Template(template), tokenizer, max_length=10)
    row = {"a": "w0 w1 w2 w3 w4 w5", "b": "w10 w11 w12"}
    ids = encoder.encode(row, [[99]])[0].input_ids
    assert [t if t == 99 else tokenizer.convert_ids_to_tokens(t) for t in ids[1:-1]] == [
        99 if word == "?" else word for word in expected.split()
    ]
    # Of several answers, all have the text that is cut for the longest one.
    first, second = encoder.encode(row, [[99], [99, 99]])
    without = [[t for t in each.input_ids if t != 99] for each in (first, second)]
    assert without[0] == without[1] and len(second.input_ids) == 10
    assert encoder.encode({"a": "w0", "b": ""}, [[99]])[0].input_ids.count(99) == 1


def test_texts_that_cannot_be_cut(tmp_path):
    tokenizer = plain(tmp_path)
    with pytest.raises(TemplateError, match="the template has 6 tokens without the texts of a row, more than"):
        TemplateEncoder(Template("{a} w1 w2 w3 {mask}"), tokenizer, max_length=5)
    encoder = TemplateEncoder(Template("{a:whole} w1 {mask}"), tokenizer, max_length=6)
    with pytest.raises(
        TemplateError, match="has 7 tokens, more than the maximum of 6, and too few of them may be cut"
    ):
        encoder.encode({"a": "w0 w1 w2"})
    with pytest.raises(TemplateError, match="without the texts of a row"):
        encoder.check_room([[1], [1] * 4])


@pytest.mark.parametrize(
    ("row", "message"),
    [({}, r"no field 'a' in the row; it has \[\]"), ({"a": 3}, "the field 'a' must be a text, got 3")],
)
def test_bad_rows(row, message, tmp_path):
    with pytest.raises(TemplateError, match=message):
        TemplateEncoder(Template("{a} {mask}"), plain(tmp_path)).encode(row)


def test_bad_words(tmp_path):
    tokenizer = plain(tmp_path)
    with pytest.raises(TemplateError, match="does not know the word 'never'"):
        TemplateEncoder(Template("{a} {mask}"), tokenizer).word_ids("never")
    with pytest.raises(TemplateError, match=r"no `\{mask\}`"):
        TemplateEncoder(Template("{a}"), tokenizer).word_ids("w1")
