"""Distillation of a text: the model with the adapter learns to answer as it does with the text in front."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import DynamicCache

from ...backbone.calls import parameter_names
from ...backbone.find import find_cache_argument
from ..recipe import RecipeError
from ..settings import TASK_SETTINGS
from .causal_lm import CausalLM
from .task import Columns, Row, text_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

_NO_TOKEN = -1
"""Fills the tokens of a shorter context in a batch."""


class Distil(CausalLM):
    """Train an adapter so that the model answers a prompt as it does, without the adapter, with a text in front.

    The teacher, which is the frozen model, reads `context`, `prompt` and `text`. The student is the same model with
    the adapter, and reads `prompt` and `text`. The loss is the Kullback-Leibler divergence of its next token from the
    teacher's, over the whole vocabulary, on the tokens of `text` and its end-of-sequence token (Snell et al. 2022,
    https://arxiv.org/abs/2209.15189; with a prefix, Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266).

    The teacher reads a context once, and keeps its keys and values while the rows have the same context. The prefix
    starts as the first tokens of the context of the first row.

    The positions of both are those of the model: the teacher's prompt follows the context, the student's follows the
    prefix or starts at 0 (`shift_positions`). The loss compares outputs alone, so they need not be the same.

    A row: `{"context": "a text\\n", "prompt": "a question about it\\n", "text": "the answer"}`.

    Raises:
        RecipeError: As for `CausalLM`, and if the adapter is FULL or HEAD, which leave no teacher.
    """

    optional_columns = {
        "prompt": "the text before `text`, not in the loss; predictions need it",
        "context": "the text in front that the teacher sees; training and evaluation need it",
    }
    settings = TASK_SETTINGS["distil"]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        kind = self.recipe.adapter["peft_type"]
        if kind in ("FULL", "HEAD"):
            raise RecipeError(f"`adapter.peft_type`: with {kind} the base model changes, and it is the teacher.")
        self._known: tuple[list[int], Any] | None = None

    def problem(self, row: Row, with_targets: bool) -> str | None:
        if with_targets:
            if "context" not in row:
                return "there is no 'context'. If the column has another name, set `data.columns`."
            wrong = text_problem(row, "context")
            if wrong:
                return wrong
        return super().problem(row, with_targets)

    def features(self, rows: Columns, indices: list[int], with_targets: bool) -> Columns:
        result = super().features(rows, indices, with_targets)
        if with_targets:
            tokens = dict(zip(rows["context"], self._tokens(rows["context"]), strict=True))
            contexts = dict(zip(indices, rows["context"], strict=True))
            result["context"] = [tokens[contexts[row]] for row in result["row"]]
        return result

    def start_tokens(self, features: Dataset, count: int, seed: int) -> list[int]:
        context: list[int] = features[0]["context"]
        if len(context) < count:
            raise ValueError(
                f"the context of the first row has {len(context)} tokens, and the prefix {count}: set "
                "`adapter.num_virtual_tokens` to less."
            )
        return context[:count]

    def collate(self, features: Sequence[Row]) -> dict[str, Tensor]:
        batch = super().collate(features)
        if "context" in features[0]:
            contexts = [torch.tensor(each["context"]) for each in features]
            batch["context"] = torch.nn.utils.rnn.pad_sequence(contexts, True, _NO_TOKEN)
        return batch

    def loss(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        counted = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            taught = self._teach(model, inputs, batch["context"])[:, :-1][counted].float().log_softmax(-1)
        output = model(**inputs)
        learned = output.logits[:, :-1][counted].float().log_softmax(-1)
        return F.kl_div(learned, taught, reduction="batchmean", log_target=True), output

    def _teach(self, model: Any, inputs: dict[str, Tensor], contexts: Tensor) -> Tensor:
        """The logits `[batch, tokens, words]` of the model without its adapter, behind the context of each row."""
        found: list[Any] = [None] * len(contexts)
        adapter = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
        training = model.training
        # Without dropout. Gradient checkpointing, which drops caches, is for training mode only.
        model.eval()
        with nullcontext() if adapter is None else adapter.disable_adapter():
            rows = list(range(len(contexts)))
            while rows:
                context = contexts[rows[0]]
                same = [row for row in rows if torch.equal(contexts[row], context)]
                rows = [row for row in rows if row not in same]
                logits = self._continue(model, context[context != _NO_TOKEN], {k: v[same] for k, v in inputs.items()})
                for row, own in zip(same, logits, strict=True):
                    found[row] = own
        model.train(training)
        return torch.stack(found)

    def _continue(self, model: Any, context: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The logits of some rows behind one context `[tokens]`."""
        mask = inputs["attention_mask"]
        seen = mask.new_ones(len(mask), len(context))
        name = self._cache_argument(model)
        tokens = context.tolist()
        if self._known is None or self._known[0] != tokens:
            cache = DynamicCache(config=_base_of(model).config.get_text_config())
            # Only the keys and values are wanted.
            short = {"logits_to_keep": 1} if "logits_to_keep" in parameter_names(_base_of(model)) else {}
            model(input_ids=context[None], attention_mask=seen[:1], use_cache=True, **{name: cache}, **short)
            self._known = tokens, cache
        cache = copy.deepcopy(self._known[1])
        cache.batch_repeat_interleave(len(mask))
        whole = torch.cat([seen, mask], dim=1)
        output = model(input_ids=inputs["input_ids"], attention_mask=whole, use_cache=True, **{name: cache})
        logits: Tensor = output.logits
        return logits

    def _cache_argument(self, model: Any) -> str:
        name = find_cache_argument(_base_of(model))
        if name is None:
            raise RecipeError(f"`model`: {self.recipe.model} takes no cache, in which the teacher keeps a context.")
        return name

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {}


def _base_of(model: Any) -> Any:
    """The transformers model without an adapter's wrapper, and without Accelerate's."""
    adapter = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if adapter is not None:
        return adapter.get_base_model()
    return next(module for module in model.modules() if hasattr(module, "config"))
