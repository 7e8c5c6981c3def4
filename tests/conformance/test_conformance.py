"""The conformance checks on some model types; `run.py` in this folder runs them on all types."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from checks import CHECKS
from run import run_one
from zoo import tasks_of, text_model_types

# One type of each kind: encoders; decoders with grouped-query and multi-query attention, ALiBi, learned positions with
# an offset, unusual head sizes, latent attention, sliding windows, shared keys and values, their own masks, inverted
# masks; hybrids; encoder-decoders with relative, learned and sinusoidal positions.
WORKS = [
    ("bert", "MULTIPLE_CHOICE"), ("roberta", "CAUSAL_LM"), ("electra", "TOKEN_CLS"), ("roformer", "MASKED_LM"),
    ("megatron-bert", "SEQ_CLS"), ("gpt2", "QUESTION_ANS"), ("llama", "CAUSAL_LM"), ("mistral", "CAUSAL_LM"),
    ("qwen3", "CAUSAL_LM"), ("falcon", "CAUSAL_LM"), ("gpt_bigcode", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"),
    ("mpt", "CAUSAL_LM"), ("opt", "SEQ_CLS"), ("gptj", "CAUSAL_LM"), ("gpt_neo", "CAUSAL_LM"),
    ("deepseek_v3", "CAUSAL_LM"), ("gemma3n_text", "CAUSAL_LM"), ("jamba", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"), ("marian", "SEQ_2_SEQ_LM"), ("t5gemma", "SEQ_2_SEQ_LM"),
]  # fmt: skip
# Speech to text with three prefixes; an image in the middle of a text with positions of its own, in front of it, and
# in cross-attention; an encoder that is another model; audio codes.
OTHER_MODALITIES = [
    ("whisper", "SPEECH_SEQ_2_SEQ"), ("qwen2_vl", "MULTIMODAL_LM"), ("blip-2", "MULTIMODAL_LM"),
    ("mllama", "MULTIMODAL_LM"), ("vision-encoder-decoder", "MULTIMODAL_LM"), ("musicgen", "CAUSAL_LM_OF_CODES"),
]  # fmt: skip
REFUSED = ["albert", "distilbert", "deberta-v2", "modernbert", "mamba", "prophetnet", "deepseek_v32", "hrm_text"]
# Through the attention function: local layers, one module for all layers, disentangled attention, images, sound.
AT_ATTENTION = [
    ("modernbert", "TOKEN_CLS"), ("albert", "MULTIPLE_CHOICE"), ("deberta-v2", "QUESTION_ANS"), ("vit", "IMAGE_CLS"),
    ("wav2vec2", "CTC"),
]  # fmt: skip


def assert_works(model_type, task, names):
    result = run_one(model_type, task, names)
    failed = {name: said for name, said in result["checks"].items() if said.startswith("FAIL")}
    assert result["status"] == "works", failed or result.get("why")


@pytest.mark.parametrize(("model_type", "task"), WORKS, ids="-".join)
def test_works(model_type, task):
    assert_works(model_type, task, [name for name in CHECKS if name != "compiled"])


def cases(types, is_slow):
    """The model types and tasks as parameters of a test, slow where `is_slow` says so of the type."""
    marks = {True: (pytest.mark.slow,), False: ()}
    return [pytest.param(*each, marks=marks[is_slow(each[0])], id="-".join(each)) for each in types]


# The compiler takes longer than all other checks together.
@pytest.mark.parametrize(("model_type", "task"), cases(WORKS, lambda name: name not in ("bert", "llama")))
def test_compiled(model_type, task):
    assert_works(model_type, task, ["compiled"])


@pytest.mark.parametrize(
    ("model_type", "task"),
    cases([*OTHER_MODALITIES, *AT_ATTENTION], lambda name: name in ("blip-2", "musicgen", "vision-encoder-decoder")),
)
def test_other_modalities_and_the_attention_function(model_type, task):
    entry_point = "cache" if (model_type, task) in OTHER_MODALITIES else "attention"
    result = run_one(model_type, task, [name for name in CHECKS if name != "compiled"], entry_point)
    failed = {name: said for name, said in result["checks"].items() if said.startswith("FAIL")}
    assert result["status"] == "works", failed or result.get("why")
    assert result["checks"]["effect_and_gradients"] == "pass"


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type):
    result = run_one(model_type, tasks_of(model_type)[0])
    assert result["status"] == "refused", result


def test_all_types_are_found():
    """New model types of transformers are found automatically; a small number means that the search is broken."""
    types = text_model_types()
    assert len(types) > 200 and {name for name, _ in WORKS} | set(REFUSED) <= set(types)
