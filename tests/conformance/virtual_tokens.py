"""Try P-Tuning on every text model type of the installed transformers.

python tests/conformance/virtual_tokens.py [--types bert llama ...] [--json FILE]

A virtual token that starts from a word is that word. So a model with placeholders must compute what it computes with
the words, and generate the same tokens. (Not where a second table has rows for words: Gemma 3n and 4.) Other virtual
tokens must change its outputs and get a gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
import zoo
from checks import Skip, outputs
from torch import Tensor

from prefix_adapter import PTuningConfig, get_peft_model
from prefix_adapter.ptuning.embeddings import InputEmbeddings

N = 3
TASKS = ("MASKED_LM", "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE")


class Refused(Exception):
    """Raised for a model without a table of input embeddings."""


def with_placeholders(ids: Tensor, first: int) -> tuple[Tensor, list[int]]:
    """Replace three words of the first row, wherever they stand in the batch, by placeholders."""
    words = list(dict.fromkeys(ids.flatten().tolist()[1:]))[:N]
    changed = ids.clone()
    for index, word in enumerate(words):
        changed[ids == word] = first + index
    return changed, words


def check(model_type: str, task: str) -> None:
    """Try one model type and task.

    Raises:
        AssertionError: If virtual tokens do not do what they should.
    """
    model = zoo.tiny_model(model_type, task)
    inputs = zoo.tiny_inputs(model, task)
    ids = inputs.get("input_ids")
    if ids is None:
        raise Skip("no token ids")
    # One row, repeated: then each row has all of the words.
    inputs = {
        name: value[:1].expand(2, *value.shape[1:]).clone() if isinstance(value, Tensor) and value.dim() else value
        for name, value in inputs.items()
    }
    try:
        vocabulary = InputEmbeddings(model).vocabulary
    except ValueError as error:
        raise Refused(str(error)) from error
    changed, words = with_placeholders(inputs["input_ids"], vocabulary)
    expected = outputs(model, inputs)
    settings: dict[str, Any] = {"num_virtual_tokens": N, "encoder_reparameterization_type": None}
    wrapped = get_peft_model(model, PTuningConfig(init_token_ids=words, **settings)).eval()
    with_words = {**inputs, "input_ids": changed}
    # A second table of token ids (Gemma 3n and 4) has no row for a virtual token.
    same_as_words = not InputEmbeddings(model).find_other_tables()
    if same_as_words:
        torch.testing.assert_close(outputs(wrapped, with_words), expected, atol=1e-4, rtol=1e-4)
    if same_as_words and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and model.can_generate():
        common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens = wrapped.generate(input_ids=changed, **common)
        with wrapped.disable_adapter():
            same = wrapped.generate(input_ids=inputs["input_ids"], **common)
        start = 0 if model.config.is_encoder_decoder else changed.shape[1]
        assert torch.equal(tokens[:, start:], same[:, start:]), "other tokens are generated"
    with torch.no_grad():
        for parameter in wrapped.base_model.layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert (outputs(wrapped, with_words) - expected).abs().max() > 1e-4, "virtual tokens have no effect"
    with torch.enable_grad():
        other = outputs(wrapped.train(), with_words)
        (other * torch.randn(other.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for parameter in wrapped.base_model.layer.parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), "no gradient"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = {}
    for model_type in options.types or zoo.text_model_types():
        tasks = zoo.tasks_of(model_type)
        task = next((each for each in TASKS if each in tasks), None)
        if task is None:
            continue
        try:
            check(model_type, task)
            said = "works"
        except (zoo.NotBuilt, Skip) as error:
            said = f"not run: {str(error)[:150]}"
        except Refused as error:
            said = f"refused: {error}"
        except Exception as error:
            said = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        results[model_type] = {"task": task, "result": said}
        print(f"{model_type} {task}: {said}", flush=True)
    print(Counter(each["result"].partition(" ")[0].strip(":") for each in results.values()))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    sys.exit(any(each["result"].startswith("FAILED") for each in results.values()))


if __name__ == "__main__":
    main()
