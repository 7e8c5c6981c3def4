"""The base model of a recipe, its adapter, the optimizer and the learning rate schedule."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from torch import Tensor, nn

from ..adapters.start import has_position_table, init_from, init_from_text, position_limit, token_ids

# Not from peft: this import registers our method with PEFT.
from ..api import PeftModel, get_peft_model, turn_off_dropout
from ..backbone.parallel import is_divided
from ..files.contents import PEFT_HEADS, SAVED_ROOT, SECOND
from ..messages import did_you_mean, join_names
from ..prefix.layer import PrefixTuningV2Layer, find_prefix_layer, prefix_layer_or_none
from ..ptuning.names import LAYER_NAME
from .recipe import NO_ADAPTER, RecipeError, say
from .tasks import TASK_CLASSES
from .tasks.template_task import is_masked_lm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .recipe import Recipe
    from .tasks import Task

# With a new task head, a prefix table learns faster from this standard deviation than from the reference's 0.02
# (docs/learning.md). Without a new head the model already works, and a large prefix only disturbs it.
_TABLE_STD = 0.5
_RATES = {"PREFIX_TUNING_V2": 3e-2, "LORA": 2e-3, "FULL": 3e-5}
# Of a prefix on a decoder with a new head, which a rate three times as high keeps at chance for long.
_BESIDE_DECODER_HEAD_RATE = 1e-2
# Of a prefix where each token of a text has a loss: tags, and what a decoder writes. It bears more, and needs it. It
# was measured with 10 and 20 virtual tokens; with 100 it is too high (docs/learning.md).
_TOKENS_RATE, _TOKENS_RATE_LENGTH = 1e-1, 40
_MLP_RATE = 1e-3
_HEAD_RATE = 2e-2
# On a decoder the head reads the states themselves, whose elements are ten to fifty times as large as those of an
# encoder's pooled output. AdamW moves each weight by about the rate, so one step moves a score by about the rate times
# the sum of the elements. This number divided by the head's width was measured with widths of 576 and 640.
_DECODER_HEAD_RATE_BY_WIDTH = 3.0
# Of virtual tokens beside a model that is trained as a whole: its rate would leave them where they start.
_WORDS_RATE = 1e-3
_NUMBER = re.compile(r"\.\d+\.")
_NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer.

    Raises:
        RecipeError: if there is no tokenizer, or its vocabulary is empty. Transformers creates an empty tokenizer from
            a folder without tokenizer files; every text would be unknown or empty.
    """
    revision = {key: value for key, value in recipe.model_kwargs.items() if key == "revision"}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            recipe.model, **revision, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        missing = "" if os.path.isdir(recipe.model) else f"There is no folder {recipe.model!r}, and on the Hub: "
        raise RecipeError(
            f"`model`: no tokenizer can be loaded from {recipe.model!r}: {missing}{_explain(error)}"
        ) from error
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if len(tokenizer.get_vocab().keys() - special) < 2:  # T5's empty tokenizer still has the sign for a space.
        raise RecipeError(
            f"`model`: {recipe.model!r} has no tokenizer: the vocabulary has only special tokens. Save the model's "
            "tokenizer into the same folder (`tokenizer.save_pretrained`)."
        )
    return tokenizer


def _explain(error: BaseException) -> str:
    """The message of a loading error, with the way out if there is one."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code from its repository, which is not run by default. If you trust the code, use "
            "--trust_remote_code, or in Python `trust_remote_code=True`."
        )
    if found := re.match(r"Unrecognized configuration class <class '.*\.(\w+)Config'>", str(error)):
        return f"{found[1]} has no such head. Choose another base model, or another task."
    return str(error)


def check_packages(recipe: Recipe) -> None:
    """Check that the packages are there that the recipe needs besides those of the extra `train`.

    Raises:
        RecipeError: if one is missing.
    """
    if recipe.load_in_4bit and find_spec("bitsandbytes") is None:
        raise RecipeError(
            "`load_in_4bit` needs the package bitsandbytes: pip install bitsandbytes. Without it, set "
            "`load_in_4bit: false`."
        )


def _quantization(recipe: Recipe, auto_class: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load the base model in 4 bits; none unless the recipe asks for it.

    Args:
        recipe: the recipe.
        auto_class: the class that loads the model.
        settings: the other arguments of its `from_pretrained`.
    """
    if not recipe.load_in_4bit:
        return {}
    check_packages(recipe)
    options = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
    config = transformers.AutoConfig.from_pretrained(recipe.model, **options)
    trust = {"trust_remote_code": recipe.trust_remote_code}
    with torch.device("meta"):
        model = auto_class.from_config(config, **trust)
    # Only the repeated layers, which have a number: a head, or a pooler without weights, is trained.
    kept = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _NUMBER.search(name)
    ]
    # As in QLoRA (Dettmers et al. 2023). Products are computed in the second dtype.
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": quantized}


def _keep_differentiable(model: Any) -> None:
    """Have bitsandbytes leave 4-bit weights as they are: on some CPUs an evaluation packs them for good, and then no
    gradient passes through them any more.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def load_base(recipe: Recipe, task: Task, processes: int = 1) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model with the task's head.

    A head that was trained with another number of labels is replaced by a new one.

    Args:
        recipe: the recipe.
        task: the task.
        processes: the number of processes that divide each layer (tensor parallelism).

    Returns:
        The model, and the names of its new modules: the head, and other modules that the checkpoint has no weights
        for, such as a pooler.

    Raises:
        RecipeError: if the model cannot be loaded with this head, or the tokenizer does not fit the model.
    """
    # PEFT reads this deprecated attribute in every forward.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    auto_class = getattr(transformers, task.auto_class)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # No warning about the missing head: it is trained.
    divided = {"distributed_config": {"tp_size": processes}} if processes > 1 else {}
    try:
        settings = {**task.model_kwargs(), **recipe.model_kwargs, "trust_remote_code": recipe.trust_remote_code}
        model, found = auto_class.from_pretrained(
            recipe.model,
            **{**settings, **_quantization(recipe, auto_class, settings), **divided},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise RecipeError(
            f"`model`: {recipe.model!r} cannot be loaded as {task.auto_class}: {_explain(error)}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _keep_differentiable(model)
    outside = [
        name for name, child in model.named_children() if child is not model.base_model and list(child.parameters())
    ]
    heads = outside if task.has_head and model.base_model is not model else []
    _check_sizes(recipe, found["mismatched_keys"], heads)
    if found["missing_keys"] and not task.trains_new_modules:
        raise RecipeError(
            f"`model`: the checkpoint of {recipe.model!r} lacks {join_names(found['missing_keys'])}, so it is no "
            f"{task.auto_class} that was trained. {recipe.task} trains no head of its own."
        )
    missing = sorted({name.rpartition(".")[0] for name in found["missing_keys"]})
    _fit_tokenizer(recipe, task, model)
    for name in missing:
        if processes > 1 and is_divided(model.get_submodule(name)):
            raise RecipeError(
                f"`model`: {recipe.model!r} has no weights for {name}, which tensor parallelism divides: each process "
                "would draw other numbers for its part. Use a configuration without `parallelism_config`."
            )
    return model, [
        *heads,
        *(name for name in missing if not f"{name}.".startswith(tuple(f"{head}." for head in heads))),
    ]


def _check_sizes(recipe: Recipe, mismatched: Iterable[Any], heads: list[str]) -> None:
    """Check that only the head's tensors have other shapes in the checkpoint than in the model.

    Args:
        recipe: the recipe.
        mismatched: for each such tensor its name, its shape in the checkpoint and its shape in the model.
        heads: names of the head's modules.

    Raises:
        RecipeError: if a tensor outside the head has another shape.
    """
    for name, theirs, ours in sorted(mismatched):
        if not name.startswith(tuple(f"{head}." for head in heads)):
            raise RecipeError(
                f"`model`: {name} is {tuple(theirs)} in the checkpoint of {recipe.model!r}, and {tuple(ours)} in its "
                "configuration (with `model_kwargs`)."
            )
    sizes = {(theirs[0], ours[0]) for _, theirs, ours in mismatched if len(theirs) == 2 and len(ours) == 2}
    for theirs, ours in sizes:
        say(f"{recipe.model} has a head with {theirs} outputs. The task needs {ours}, so a new head replaces it.")


def _fit_tokenizer(recipe: Recipe, task: Task, model: Any) -> None:
    """Check that the model has an embedding for each token, and set the model's padding token.

    Raises:
        RecipeError: if the tokenizer has tokens without an embedding.
    """
    known, tokenizer = model.get_input_embeddings().weight.shape[0], task.tokenizer
    known = known or model.config.get_text_config().vocab_size  # Sharded parameters have an empty shape.
    largest = max(tokenizer.vocab_size - 1, *tokenizer.all_special_ids)
    if largest >= known:
        raise RecipeError(
            f"`model`: the tokenizer of {recipe.model!r} has a token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), and the model has embeddings for {known:,} tokens only. "
            "The tokenizer belongs to another model, or the embeddings were not resized after tokens were added."
        )
    task.embeddings = known
    # A decoder classifies by the last token that is not padding, and may have no padding token by default.
    config = model.config.get_text_config()
    if task.has_head and getattr(config, "pad_token_id", None) != tokenizer.pad_token_id:
        config.pad_token_id = tokenizer.pad_token_id


def adapter_configs(recipe: Recipe, task: Task) -> list[PeftConfig]:
    """The PEFT configurations of a recipe: of `adapter`, unless it is FULL, HEAD or NONE, and of `second_adapter`.

    Raises:
        RecipeError: if a method or a setting does not exist, or a value is invalid.
    """
    configs = []
    if recipe.adapter["peft_type"] not in NO_ADAPTER:
        configs.append(_new_config(recipe, task, "adapter"))
    elif settings := [key for key in recipe.adapter if key != "peft_type"]:
        raise RecipeError(f"`adapter.{settings[0]}`: {recipe.adapter['peft_type']} has no settings.")
    if recipe.second_adapter:
        if configs and configs[0].is_prompt_learning:
            raise RecipeError(
                f"`second_adapter`: PEFT's {recipe.adapter['peft_type']} changes the inputs itself, and nothing can "
                "stand beside it. Set another `adapter`: a prefix or LoRA."
            )
        configs.append(_new_config(recipe, task, "second_adapter"))
    check_virtual_tokens(recipe, task, configs[-1] if configs else None)
    return configs


def _new_config(recipe: Recipe, task: Task, part: str) -> PeftConfig:
    """The PEFT configuration under one key of a recipe, `adapter` or `second_adapter`.

    Raises:
        RecipeError: see `adapter_configs`.
    """
    settings = dict(getattr(recipe, part))
    kind = settings.pop("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config_class is None:
        known = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
        known += NO_ADAPTER
        raise RecipeError(
            f"`{part}.peft_type`: there is no method {kind!r}; there are {known}.{did_you_mean(kind, known)}"
        )
    fields = {each.name for each in dataclasses.fields(config_class)}
    for key in settings:
        if key not in fields:
            raise RecipeError(
                f"`{part}.{key}`: {config_class.__name__} has no such setting; it has {sorted(fields)}."
                f"{did_you_mean(key, fields)}"
            )
    if kind == "PREFIX_TUNING_V2" and task.has_head and not settings.get("prefix_projection"):
        settings.setdefault("init_std", _TABLE_STD)
    if "placeholder_token_ids" in fields and task.placeholder_token_ids:
        settings.setdefault("placeholder_token_ids", list(task.placeholder_token_ids))
        settings.setdefault("num_virtual_tokens", len(task.placeholder_token_ids))
        if any(start is not None for start in task.start_token_ids):
            settings.setdefault("init_token_ids", list(task.start_token_ids))
            settings.setdefault("encoder_reparameterization_type", None)  # an encoder makes other vectors of words
    if recipe.init_text is not None:
        count = len(token_ids(recipe.init_text, task.tokenizer))
        if settings.setdefault("num_virtual_tokens", count) > count:
            raise RecipeError(
                f"`adapter.num_virtual_tokens`: `init_text` has {count} tokens, not {settings['num_virtual_tokens']}. "
                "Leave it out, or set a smaller number, for a prefix that starts from the first tokens of the text."
            )
    if task.peft_task_type is not None:
        settings.setdefault("task_type", task.peft_task_type)
    if task.modules_to_save is not None and "modules_to_save" in fields:
        settings.setdefault("modules_to_save", list(task.modules_to_save))
    try:
        config = config_class(**settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"`{part}`: {error}") from error
    if config.is_prompt_learning and config.task_type is None:
        raise RecipeError(
            f"`adapter.peft_type`: PEFT's {kind} needs an `adapter.task_type`, and has none for this task."
        )
    return config


def check_virtual_tokens(recipe: Recipe, task: Task, config: PeftConfig | None) -> None:
    """Check that an adapter trains the virtual tokens of the task's template.

    Args:
        recipe: the recipe.
        task: the recipe's task.
        config: the PEFT configuration of the recipe's last adapter; `None` if there is none.

    Raises:
        RecipeError: if it does not, if it has other token ids for them, or if the second adapter has none to train.
    """
    ids = getattr(config, "placeholder_token_ids", None)
    part = "second_adapter" if recipe.second_adapter else "adapter"
    if recipe.second_adapter and not task.placeholder_token_ids:
        raise RecipeError(
            "`second_adapter` trains virtual tokens, and `task_kwargs.template` has none. Put `{p}` where they are to "
            "stand, or leave `second_adapter` out."
        )
    if not task.placeholder_token_ids or ids == task.placeholder_token_ids:
        return
    if ids is None:
        raise RecipeError(
            f"`task_kwargs.template` has virtual tokens (`{{p}}`), which {recipe.adapter['peft_type']} does not "
            "train: leave them out, set another `adapter.peft_type`, or add `second_adapter: {peft_type: PTUNING_V1}`."
        )
    raise RecipeError(
        f"`{part}.placeholder_token_ids`: the adapter has {ids}, and the template {task.placeholder_token_ids}."
    )


def wrap(recipe: Recipe, task: Task, base: PreTrainedModel, new: list[str]) -> nn.Module:
    """Add the adapter or adapters to the base model and freeze everything that is not trained.

    Args:
        recipe: the recipe.
        task: the recipe's task.
        base: the base model.
        new: the names of the base model's new modules (see `load_base`). All are trained and saved: their initial
            values are random, and would be other values when the adapter is loaded.

    Raises:
        RecipeError: see `adapter_configs`.
        UnsupportedBackboneError: if the model does not support a prefix.
    """
    configs = adapter_configs(recipe, task)
    second = configs.pop() if recipe.second_adapter else None
    config = configs[0] if configs else None
    if recipe.adapter["peft_type"] != "FULL" and not recipe.backbone_dropout:
        turn_off_dropout(base)
    model: Any = base
    if config is not None:
        if hasattr(config, "modules_to_save"):
            if "modules_to_save" not in recipe.adapter:
                # The task lists the heads of all architectures: keep those that this model has.
                names = [name for name, _ in base.named_modules()]
                own = [ending for ending in config.modules_to_save or () if any(n.endswith(ending) for n in names)]
                config.modules_to_save = own or None
            known = {*PEFT_HEADS.get(config.task_type or "", ()), *(config.modules_to_save or ())}
            more = [name for name in new if not known & set(name.split("."))]
            config.modules_to_save = [*(config.modules_to_save or ()), *more] or None
        model = get_peft_model(base, config)
        _shift_positions_if_needed(recipe, task, model)
    elif recipe.adapter["peft_type"] == "HEAD":
        base.base_model.requires_grad_(False)
        for name in new:
            base.get_submodule(name).requires_grad_(True)
    elif recipe.adapter["peft_type"] == "NONE":
        if new:
            raise RecipeError(
                f"`adapter.peft_type`: with NONE nothing is trained, and {', '.join(new)} of {recipe.model} would "
                "have random weights. HEAD trains them alone."
            )
        base.requires_grad_(False)
        return base
    if second is not None:
        with peft_allows_a_second_adapter():
            model = get_peft_model(model, second, SECOND)
        if config is not None:
            second.base_model_name_or_path = config.base_model_name_or_path  # PEFT looks for it in the inner model
        else:  # FULL
            base.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"`adapter.peft_type`: {recipe.model} has no head for {recipe.task} to train.")
    if recipe.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model


def _shift_positions_if_needed(recipe: Recipe, task: Task, model: PeftModel) -> None:
    """Shift the positions of the input where a prefix cannot start from a text without, unless the recipe sets it.

    That is so in a decoder with a table of positions, such as GPT-2. It must be long enough for prefix and input.
    """
    starts = recipe.init_text is not None or recipe.init_rows is not False
    if not starts or recipe.init_from or "shift_positions" in recipe.adapter or not _can_start_from_rows(model):
        return
    layer = find_prefix_layer(model)
    limit = position_limit(layer)
    fits = limit is None or layer.adapters["default"].length + task.max_length <= limit
    if has_position_table(layer) and fits:
        config: Any = model.peft_config["default"]
        config.shift_positions = True
        layer.shift_positions("default")


def initialize_prefix(recipe: Recipe, task: Task, model: Any, features: Dataset) -> None:
    """Initialize the prefix from `init_from`, `init_text` or training rows; otherwise it stays random.

    Args:
        recipe: the recipe.
        task: the recipe's task.
        model: the model with the prefix.
        features: the features of the training rows.

    Raises:
        RecipeError: if the text, the rows or the adapter do not fit the prefix.
    """
    # With FSDP's `cpu_ram_efficient_loading` only the main process has weights; the others receive them later. Until
    # then theirs are on the meta device or, in transformers 5.17, zeros.
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if torch.distributed.is_initialized() and not model.get_input_embeddings().weight.any():
        return
    key = next((key for key in ("init_from", "init_text", "init_rows") if getattr(recipe, key)), None)
    try:
        if key == "init_from":
            init_from(model, str(recipe.init_from))
        elif key == "init_text":
            init_from_text(model, str(recipe.init_text), tokenizer=task.tokenizer, truncate=True)
        elif key == "init_rows" or (recipe.init_rows is None and _can_start_from_rows(model)):
            length = find_prefix_layer(model).adapters["default"].length
            init_from_text(model, task.start_tokens(features, length, recipe.seed))
    except (OSError, ValueError) as error:
        if key is not None:
            raise RecipeError(f"`{key}`: {error}") from error
        say(f"The prefix starts from random numbers and not from training rows (`init_rows`): {error}")


def _can_start_from_rows(model: nn.Module) -> bool:
    """Whether a model has a prefix that may start from a text: a table in all layers of a decoder, at the cache."""
    layer = prefix_layer_or_none(model)
    if layer is None or not layer.is_decoder:
        return False
    adapter, slots = layer.adapters["default"], {s for target in layer.targets for s in target.slots.values()}
    is_table = layer.encoder_of("default").output is None
    return is_table and layer.entry_point == "cache" and adapter.strength == 1 and slots == set(adapter.columns)


@contextmanager
def peft_allows_a_second_adapter() -> Iterator[None]:
    """Leave out PEFT's two warnings of an adapter that is put around another one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        yield


class AdapterPart(NamedTuple):
    """One of the adapters of a model.

    Attributes:
        name: its name in the PEFT model.
        model: the PEFT model that was made with it.
        root: what the names of this model's tensors begin with in the whole model.
    """

    name: str
    model: PeftModel
    root: str


def adapter_parts(model: nn.Module) -> list[AdapterPart]:
    """The adapters of a run's model, the first one first; none for a model without PEFT.

    The second one alone stands beside FULL: the base model is trained too.
    """
    if not isinstance(model, PeftModel):
        return []
    inner = model.get_base_model()
    if isinstance(inner, PeftModel):
        return [AdapterPart("default", inner, SAVED_ROOT), AdapterPart(SECOND, model, "")]
    return [AdapterPart(str(model.active_adapter), model, "")]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a training run saves of a model, by name: the trained parameters, and the frozen rows of prefixes."""
    kept = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, PrefixTuningV2Layer)
        for key, _ in module.named_buffers()
    }
    frozen = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**trained_parameters(model), **frozen}


def learning_rates(recipe: Recipe, model: nn.Module) -> list[float]:
    """The learning rates of the adapter and of the head, and of the second adapter if the recipe has one.

    Defaults take the place of missing values.
    """
    is_full = recipe.adapter["peft_type"] == "FULL"
    rate = recipe.learning_rate or _default_rate(recipe, model)
    head_rate = recipe.head_learning_rate or (rate if is_full else _default_head_rate(model))
    second_rate = recipe.second_learning_rate or (_WORDS_RATE if is_full else rate)
    return [rate, head_rate, *([second_rate] if recipe.second_adapter else ())]


def _default_rate(recipe: Recipe, model: nn.Module) -> float:
    if recipe.adapter.get("prefix_projection"):
        return _MLP_RATE
    if recipe.adapter["peft_type"] == "PREFIX_TUNING_V2":
        layer = find_prefix_layer(model)
        has_head = any("modules_to_save" in name for name in trained_parameters(model))
        if layer.is_decoder and has_head:
            return _BESIDE_DECODER_HEAD_RATE
        # Not of an encoder-decoder that writes, where such a rate was not measured.
        is_short = layer.adapters["default"].length <= _TOKENS_RATE_LENGTH
        if is_short and TASK_CLASSES[recipe.task].labels_per_token and (layer.is_decoder or has_head):
            return _TOKENS_RATE
    return _RATES.get(recipe.adapter["peft_type"], 1e-2)


def _default_head_rate(model: nn.Module) -> float:
    if not _is_decoder(model):
        return _HEAD_RATE
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_head = {name for name in trained_parameters(model) if _part_of(model, name) == "head"}
    widths = [linear.in_features for name, linear in linears.items() if f"{name}.weight" in in_head]
    return min(_HEAD_RATE, _DECODER_HEAD_RATE_BY_WIDTH / max(widths, default=1))


def _is_decoder(model: nn.Module) -> bool:
    """Whether a model has decoder self-attention alone, as Llama and GPT-2 have."""
    layer = prefix_layer_or_none(model)
    if layer is not None:
        return layer.is_decoder
    config: Any = model.config
    return (
        type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        and not config.is_encoder_decoder
        and not is_masked_lm(config)
    )


def unusual_rate(recipe: Recipe, model: nn.Module) -> str | None:
    """What is unusual about the learning rate of a recipe's adapter; `None` if nothing is, or if none is known.

    A recipe of the package sets the rate of a prefix, which stays when an option replaces `adapter`.
    """
    kind = recipe.adapter["peft_type"]
    if recipe.learning_rate is None or kind not in _RATES:
        return None
    usual = _default_rate(recipe, model)
    if usual / 30 <= recipe.learning_rate <= usual * 10:  # published rates are between these
        return None
    return (
        f"`learning_rate` {recipe.learning_rate:g} is far from the default of {usual:g} for this {kind}. Set `null` "
        "for the default."
    )


def new_optimizer(recipe: Recipe, model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with a learning rate for the adapter, the head and the second adapter.

    Args:
        recipe: the recipe.
        model: the model.
        fused: whether to use PyTorch's fused kernel.
    """
    groups: dict[str, list[nn.Parameter]] = {"adapter": [], "head": [], "second_adapter": []}
    for name, parameter in trained_parameters(model).items():
        groups[_part_of(model, name)].append(parameter)
    rates = learning_rates(recipe, model)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rates[number], "name": part}
        for number, (part, parameters) in enumerate(groups.items())
        if parameters
    ]
    settings = settings or [{"params": [], "lr": rates[0], "name": "adapter"}]  # AdamW needs a group
    return torch.optim.AdamW(settings, weight_decay=recipe.weight_decay, fused=fused or None)


def _part_of(model: nn.Module, name: str) -> str:
    """The part of a model that a trained parameter belongs to: adapter, head or second_adapter."""
    parts = adapter_parts(model)
    if parts and parts[0].name == SECOND:
        if name.startswith(f"{SAVED_ROOT}{LAYER_NAME}."):
            return "second_adapter"
        model, name, parts = parts[0].model.get_base_model(), name.removeprefix(SAVED_ROOT), []
    if not parts:
        return "adapter" if name.startswith(f"{model.base_model_prefix}.") else "head"
    if "modules_to_save" in name:
        return "head"
    # The second adapter's layer is a child of the inner PEFT model, the first one's is deeper in it.
    is_second = len(parts) == 2 and not name.startswith(f"{parts[0].root}{SAVED_ROOT}")
    return "second_adapter" if is_second else "adapter"


def new_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int) -> Any:
    """The learning rate schedule of a recipe.

    Args:
        recipe: the recipe.
        optimizer: the optimizer.
        steps: all optimizer steps of the run.
        steps_per_epoch: the optimizer steps of an epoch.

    Raises:
        RecipeError: if the schedule or a setting does not exist.
    """
    kind, settings = recipe.lr_scheduler_type, dict(recipe.lr_scheduler_kwargs)
    warmup = round(steps * recipe.warmup_ratio)
    try:
        if kind in _NEED_A_METRIC:
            raise ValueError("it needs a metric in every step, but metrics are computed in evaluations only")
        if kind != "exponential":
            return transformers.get_scheduler(
                kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=settings
            )
        gamma = settings.pop("gamma")
        if settings:
            raise TypeError(f"no settings {sorted(settings)}")
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"`lr_scheduler_type` {kind!r} or `lr_scheduler_kwargs`: {error}") from error

    def factor(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else gamma ** (step // steps_per_epoch)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
