"""The command `prefix-adapter`: train, evaluate, use and publish adapters.

Each command imports torch only when it runs, so that `--help` and errors in the arguments appear at once.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from .messages import did_you_mean

DEBUG = "PREFIX_ADAPTER_DEBUG"
"""The environment variable with the same effect as `--debug`."""


# ---- The commands


def _train(options: Any) -> None:
    """Train an adapter.

    All settings come from a recipe: a YAML file, or the name of a recipe of the package (listed below). Options
    override the recipe. To train on several GPUs or machines: accelerate launch -m prefix_adapter train ...

      prefix-adapter train --config token-classification --model bert-base-cased \\
          --data.train train.jsonl --data.validation dev.jsonl --output_dir runs/pos --adapter.num_virtual_tokens 40
      prefix-adapter train --resume runs/pos

    The output folder gets the adapter, its model card, metrics.jsonl, curve.png and the complete recipe.
    """
    from .training.recipe import recipe_from

    recipe = recipe_from(options)  # before the import of torch, so that errors in the recipe appear at once
    from .training.run import train

    results = train(recipe, **_run_options(options))
    if results and _is_first_process():
        _print_json({split: results[split] for split in ("validation", "test") if split in results})
        print(f"The adapter is in {recipe.output_dir}.")


def _distil(options: Any) -> None:
    """Train a prefix that stands for a text: the model answers as with the text in front.

    The model asks itself questions about the text and answers them, with the text in front. Then the prefix is
    trained to give the same answers without it.

      prefix-adapter distil manual.txt --config distil --model Qwen/Qwen3-0.6B --output_dir runs/manual \\
          --adapter.num_virtual_tokens 256 --study.questions 1000

    The questions are in a file beside the output folder (runs/manual-questions.jsonl). The same command continues an
    interrupted run. To train on several GPUs, or on questions of your own, give that file to `train`:
    prefix-adapter train --config distil --data.train runs/manual-questions.jsonl
    """
    from .training.recipe import recipe_from
    from .training.settings import SelfStudy

    recipe, settings = recipe_from(options), SelfStudy(**vars(options.study))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("the questions are made by one process. Run `distil` without a launcher, or `train` with it.")
    from .training.study import distil

    results = distil(Path(options.text), recipe, settings, overwrite=options.overwrite, quiet=options.quiet)
    _print_json({split: results[split] for split in ("validation", "test") if split in results})
    print(f"The adapter is in {recipe.output_dir}.")


def _train_together(options: Any) -> None:
    """Train one prefix for several tasks.

    Each task has its own head, and gets its own adapter. The recipe is a YAML file. Keys at the top level apply to all
    tasks; keys under `tasks` apply to one task:

      model: bert-base-cased
      output_dir: runs/shared
      adapter: {num_virtual_tokens: 20}
      tasks:
        ner: {task: token-classification, data: {train: ner.jsonl}}
        topics: {task: sequence-classification, data: {train: topics.jsonl}}

      prefix-adapter train-together --config shared.yaml
      prefix-adapter train-together --resume runs/shared
      prefix-adapter evaluate runs/shared/ner
    """
    if (options.config is None) == (options.resume is None) or (options.resume and options.output_dir):
        raise ValueError("give either --config RECIPE (with or without --output_dir), or --resume FOLDER.")
    from .training.multitask import load_joint_recipe, train_together

    config, output_dir = options.config, options.output_dir
    if options.resume is not None:
        config, output_dir = _recipe_of_run(options.resume), options.resume
    given = {} if output_dir is None else {"output_dir": output_dir}
    recipe = load_joint_recipe(config, trust_remote_code=options.trust_remote_code, **given)
    results = train_together(recipe, **_run_options(options))
    if results and _is_first_process():
        splits = ("validation", "test")
        _print_json({name: {key: own[key] for key in splits if key in own} for name, own in results["tasks"].items()})
        print(f"The adapters are in {recipe.output_dir}.")


def _search(options: Any) -> None:
    """Search for the best settings of a recipe with Optuna.

    The best recipe is saved as best.yaml. By default the search varies the learning rate, the length of the prefix,
    and whether the prefix is a table or comes from an MLP. A value set by a command-line option is kept; a value from
    the --config file is varied.

      prefix-adapter search --config token-classification --model bert-base-cased --data.train train.jsonl \\
          --output_dir runs/search --search.n_trials 30
    """
    from .training.recipe import recipe_from
    from .training.settings import Search

    recipe, settings = recipe_from(options), Search(**vars(options.search))
    settings.fixed += [key for key in _recipe_keys_set(options) if key not in settings.fixed]
    from .training.search import search

    _print_json(search(recipe, settings, resume=options.resume))


def _recipe_keys_set(options: Any) -> list[str]:
    """The keys of the recipe that the command line sets, with dots for nested keys."""
    keys: list[str] = []
    for argument in options.arguments:
        name = argument[2:].partition("=")[0] if argument.startswith("--") else ""
        value = options.get(name) if name else None
        group = name.partition(".")[0]
        if group in options and group not in ("config", "resume", "search", "debug"):
            keys += [f"{name}.{each}" for each in value] if isinstance(value, dict) else [name]
    return keys


def _evaluate(options: Any) -> None:
    """Evaluate a trained adapter on rows with labels.

      prefix-adapter evaluate runs/ner                  on the test rows of the run, or else on its validation rows
      prefix-adapter evaluate runs/ner other.jsonl

    The output names the split, the file and the number of rows. The recipe in the adapter's folder is untrusted: only
    harmless settings are read from it. Use --config to name a recipe that you trust.
    """
    from .training.inference import evaluate_adapter

    metrics = evaluate_adapter(
        options.adapter, options.data, predictions=options.predictions, **_inference_options(options)
    )
    if _is_first_process():
        _print_json({"split": metrics.split, "source": metrics.source, "rows": metrics.rows, **metrics})


def _predict(options: Any) -> None:
    """Predict the rows of a file of any size.

    Files are CSV (.csv, .tsv), Parquet (.parquet), or JSON lines. Each row is written with its prediction added.

      prefix-adapter predict runs/topics reviews.csv answered.csv --bad_rows skip

    The recipe in the adapter's folder is untrusted: only harmless settings are read from it. Use --config to name a
    recipe that you trust.
    """
    from .training.inference import predict

    count = predict(
        options.adapter,
        options.source,
        options.target,
        chunk_size=options.chunk_size,
        device=options.device,
        bad_rows=options.bad_rows,
        progress=True,
        **_inference_options(options),
    )
    print(f"{count} rows answered.", file=sys.stderr)


def _inference_options(options: Any) -> dict[str, Any]:
    """The options that `evaluate` and `predict` share, as keyword arguments."""
    names = ("model", "revision", "batch_size", "overwrite", "config", "trust_remote_code")
    return {name: getattr(options, name) for name in names}


def _info(options: Any) -> None:
    """Show the settings, parameter counts and tensors of a saved adapter.

    No model is loaded.
    """
    from .adapters.saved import describe_adapter

    found = describe_adapter(options.adapter, options.revision)
    if options.json:
        _print_json(found)
        return
    _print_adapter(found)
    if "second_adapter" in found:
        print("\nsecond adapter, trained together with it:\n")
        _print_adapter(found["second_adapter"])


def _print_adapter(found: dict[str, Any]) -> None:
    """Print the description of an adapter; its texts are untrusted."""
    rows = {name: _printable(found[name]) for name in ("peft_type", "base_model", "task_type")}
    rows |= {_printable(name): _printable(value) for name, value in found["settings"].items()}
    rows |= {f"{part} parameters": f"{count:,}" for part, count in found["parameters"].items()}
    rows["file"] = f"{found['bytes']:,} bytes"
    width = max(20, *(len(name) + 2 for name in rows))
    for name, value in rows.items():
        print(f"{name:{width}}{value}")
    for name, tensor in found["tensors"].items():
        print(f"    {'x'.join(map(str, tensor['shape'])):16}{tensor['dtype']:8}{_printable(name)}")


def _fold(options: Any) -> None:
    """Replace the encoder of a saved adapter, an MLP or an LSTM, by the table that it computes.

    The outputs stay the same, and the file becomes smaller.
    """
    from .adapters.saved import fold

    print(f"Folded into {fold(options.source, options.target)}.")


def _join(options: Any) -> None:
    """Join saved prefixes side by side into one, with the virtual tokens of all of them.

      prefix-adapter join runs/contract runs/price-list both

    The outputs are those of the model with all of the adapters active. They must belong to the same base model.
    """
    from .adapters.join import join

    print(f"Joined in {join(options.sources, options.target)}.")


def _import(options: Any) -> None:
    """Convert a checkpoint of THUDM/P-tuning-v2, or a prefix of PEFT (PREFIX_TUNING, CARTRIDGE), with its task head.

      prefix-adapter import checkpoint/pytorch_model.bin ner --model bert-base-cased --task_type TOKEN_CLS
      prefix-adapter import peft-adapter ner
      prefix-adapter import epoch_30.ckpt capital --model bert-base-cased

    A file .ckpt or embeddings.pth is the prompt encoder of a THUDM/P-tuning run, and is converted without a model.

    The base model is loaded in float32. A PEFT adapter is converted only if both adapters give the same outputs, a
    checkpoint only if its backbone is that of the base model. If something cannot be converted, the error gives the
    reason and nothing is written.
    """
    from .adapters.exchange import import_peft
    from .adapters.ptuning import import_ptuning
    from .adapters.ptuning_v2 import import_ptuning_v2

    source = Path(options.source)
    if source.suffix == ".ckpt" or source.name == "embeddings.pth":
        if options.task_type:
            raise ValueError("--task_type is only for checkpoints of P-tuning-v2. A prompt encoder has no task head.")
        target = import_ptuning(source, options.target, options.model)
    elif source.is_file() or (source.is_dir() and not (source / "adapter_config.json").is_file()):
        target = import_ptuning_v2(source, options.target, options.model, options.task_type)
    elif options.task_type:
        raise ValueError("--task_type is only for checkpoints of P-tuning-v2. A PEFT adapter has its own task type.")
    else:
        target = import_peft(options.source, options.target, options.model)
    print(f"Imported into {target}.")


def _export(options: Any) -> None:
    """Convert a saved adapter, with its task head, to a PREFIX_TUNING or CARTRIDGE adapter of PEFT.

      prefix-adapter export ner peft-adapter
      prefix-adapter export manual peft-cartridge --peft_type CARTRIDGE

    PEFT has one prefix for all layers of a model or decoder, and always shifts the positions of the input behind the
    prefix. So the adapter must be trained with `shift_positions: true`. An MLP is folded into a table. The base model
    is loaded in float32, and both adapters must give the same outputs. If PEFT cannot express the adapter, the error
    gives the reason and nothing is written.
    """
    from .adapters.exchange import export_peft

    print(f"Exported to {export_peft(options.source, options.target, options.model, options.peft_type)}.")


def _export_kv(options: Any) -> None:
    """Export a saved adapter of a decoder as ready keys and values, for an inference engine.

      prefix-adapter export-kv runs/writer writer.safetensors --dtype bfloat16

    The engine puts the keys and values of the file into its cache at the positions 0 to n-1, and the prompt at n. The
    base model is loaded in float32, and its outputs behind a plain cache with these keys and values must be those of
    the adapter. If they cannot be, the error gives the reason and nothing is written.
    """
    from .adapters.engine import export_kv

    dtype, limit = options.dtype, options.max_tokens
    print(f"Exported to {export_kv(options.source, options.target, options.model, dtype, limit)}.")


def _run_module(options: Any) -> None:
    """Run any Python module with the method known to PEFT, as `python -m MODULE` would.

      prefix-adapter run -m lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag

    Programs that load adapters with PEFT know PREFIX_TUNING_V2 only after `import prefix_adapter`. This command
    imports it, then runs the module with the arguments behind its name. The exit status is that of the module.
    Processes that the module starts do not inherit the import.
    """
    import runpy
    from importlib.util import find_spec

    from . import api  # noqa: F401 (registers PREFIX_TUNING_V2)

    if not options.module:
        raise SystemExit("prefix-adapter run: -m needs the name of a module.")
    name, *arguments = options.module
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        known = find_spec(name) is not None
    except (ImportError, ValueError):  # a name with dots whose package is missing, or that is no name
        known = False
    if not known:
        raise SystemExit(f"prefix-adapter run: no module named {name!r}.")
    sys.argv = [name, *arguments]  # runpy replaces the first one by the module's file
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _serve(options: Any) -> None:
    """Serve a base model and adapters over HTTP, in OpenAI's protocol, each under a name of its own.

      prefix-adapter serve HuggingFaceTB/SmolLM2-135M-Instruct writer=runs/writer poet=runs/poet

    This is transformers' server, with one base model in memory for all adapters. A request names the base model or an
    adapter in its field `model`. There is no authentication and no encryption.
    """
    adapters: dict[str, str] = {}
    for given in options.adapters:
        name, found, folder = given.partition("=")
        if not name or (found and not folder):
            raise ValueError(f"An adapter must be given as NAME=FOLDER or FOLDER, got {given!r}.")
        if name in adapters or name == options.base:
            raise ValueError(f"The name {name!r} is given twice. Each model needs a name of its own (NAME=FOLDER).")
        adapters[name] = folder or name

    from .adapters.serving import serve

    names = ("host", "port", "device", "dtype", "attn_implementation", "trust_remote_code")
    settings = {name: getattr(options, name) for name in (*names, "continuous_batching", "num_blocks")}
    serve(options.base, adapters, **settings)


def _push(options: Any) -> None:
    """Upload the folder of an adapter to the Hub, without checkpoints and logs."""
    from .adapters.hub import push_to_hub

    private = True if options.private else None
    commit = push_to_hub(options.folder, options.repo_id, private=private, commit_message=options.commit_message)
    print(commit.commit_url)


def _is_first_process() -> bool:
    """Whether this process prints: the first of those that a launcher started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def _print_json(values: Any) -> None:
    print(_printable(json.dumps(values, indent=2, ensure_ascii=False)))


def _printable(value: Any) -> str:
    """A value as text without terminal control characters: adapter files may come from untrusted sources.

    The escapes are those of JSON, so that printed JSON stays valid.
    """
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in str(value))


# ---- The arguments of the commands


def _run_arguments(parser: Any) -> None:
    parser.add_argument("--resume", metavar="FOLDER", help="Resume the run in this folder, with the recipe in it.")
    _overwrite_argument(parser, "the run in the output folder")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Load and check everything, print the complete recipe and the first encoded rows, and write nothing.",
    )
    parser.add_argument("--quiet", action="store_true", help="Show no summary and no progress.")


def _run_options(options: Any) -> dict[str, Any]:
    """The arguments of `train` and `train_together` that are no part of a recipe."""
    return {
        "resume": options.resume is not None,
        "overwrite": options.overwrite,
        "dry_run": options.dry_run,
        "quiet": options.quiet,
    }


def _train_arguments(parser: Any) -> None:
    from .training.recipe import add_recipe_arguments

    add_recipe_arguments(parser)
    _run_arguments(parser)


def _distil_arguments(parser: Any) -> None:
    from .training.recipe import add_recipe_arguments
    from .training.settings import SelfStudy

    parser.add_argument("text", help="File with the text, in UTF-8.")
    add_recipe_arguments(parser)
    parser.add_class_arguments(SelfStudy, "study")
    _overwrite_argument(parser, "the run in the output folder")
    parser.add_argument("--quiet", action="store_true", help="Show no summary and no progress.")


def _search_arguments(parser: Any) -> None:
    from .training.recipe import add_recipe_arguments
    from .training.settings import Search

    add_recipe_arguments(parser)
    parser.add_class_arguments(Search, "search")
    parser.add_argument("--resume", action="store_true", help="Resume the search in the output folder.")


def _train_together_arguments(parser: Any) -> None:
    parser.add_argument("--config", metavar="FILE", help="A recipe (YAML).")
    parser.add_argument("--output_dir", metavar="FOLDER", help="Output folder; overrides the recipe.")
    _run_arguments(parser)
    _trust_argument(parser)


def _evaluate_arguments(parser: Any) -> None:
    _inference_arguments(parser)
    parser.add_argument(
        "data",
        nargs="?",
        help="File with labelled rows, or test, validation or train for the rows of that split in the run. Default: "
        "test if the run has test rows, else validation.",
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="Write the rows with their predictions to this file (.csv, .tsv, .parquet, or JSON lines).",
    )
    _overwrite_argument(parser, "the file of predictions")


def _predict_arguments(parser: Any) -> None:
    _inference_arguments(parser)
    parser.add_argument("source", help="File of rows; - for JSON lines from standard input.")
    parser.add_argument("target", help="File for the rows with `prediction` added; - for standard output.")
    parser.add_argument(
        "--chunk_size",
        type=_positive_int,
        default=1000,
        metavar="ROWS",
        help="Number of rows held in memory at a time (default: %(default)s).",
    )
    parser.add_argument(
        "--device", help="Device to compute on, such as cuda:1 or cpu (default: a GPU if there is one)."
    )
    parser.add_argument(
        "--bad_rows",
        choices=["stop", "skip"],
        default="stop",
        help="What to do at a row that cannot be read or answered: stop, or leave it out (default: %(default)s).",
    )
    _overwrite_argument(parser, "the target")


def _inference_arguments(parser: Any) -> None:
    parser.add_argument("adapter", help="Folder that `train` wrote, or an adapter on the Hub (user/name).")
    parser.add_argument("--model", help="Base model: a folder or a name on the Hub; overrides the recipe.")
    parser.add_argument("--revision", help="Revision of the adapter on the Hub: a branch, tag or commit.")
    parser.add_argument(
        "--batch_size", type=_positive_int, metavar="ROWS", help="Rows per forward pass; overrides the recipe."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="A recipe that you trust; replaces the recipe in the adapter's folder."
    )
    _trust_argument(parser)


def _overwrite_argument(parser: Any, replaced: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"Replace {replaced} if it exists.")


def _trust_argument(parser: Any) -> None:
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="Run Python code from the base model's repository. Only this option can allow it, never a file.",
    )


def _info_arguments(parser: Any) -> None:
    parser.add_argument("adapter", help="Folder of an adapter, or an adapter on the Hub (user/name).")
    parser.add_argument("--revision", help="Revision of the adapter on the Hub: a branch, tag or commit.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _fold_arguments(parser: Any) -> None:
    parser.add_argument("source", help="Folder of an adapter, or an adapter on the Hub (user/name).")
    _new_folder_argument(parser)


def _join_arguments(parser: Any) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        help="Folders of adapters, or adapters on the Hub (user/name), in the order of their tokens.",
    )
    _new_folder_argument(parser)


def _import_arguments(parser: Any) -> None:
    parser.add_argument(
        "source",
        help="Folder or checkpoint file of a P-tuning-v2 run, checkpoint file of a P-tuning run (.ckpt or "
        "embeddings.pth), or a PEFT adapter: a folder, or user/name on the Hub.",
    )
    _new_folder_argument(parser)
    parser.add_argument("--model", help="Base model: a folder or a name on the Hub; overrides the source.")
    parser.add_argument(
        "--task_type",
        choices=["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION"],
        help="Task of a P-tuning-v2 checkpoint, if its config.json does not name it. FEATURE_EXTRACTION imports the "
        "prefix without the head.",
    )


def _export_arguments(parser: Any) -> None:
    _fold_arguments(parser)
    parser.add_argument("--model", help="Base model: a folder or a name on the Hub; overrides the adapter.")
    parser.add_argument(
        "--peft_type",
        choices=["PREFIX_TUNING", "CARTRIDGE"],
        default="PREFIX_TUNING",
        help="PEFT's method (default: %(default)s). Both give the same outputs; CARTRIDGE keeps frozen tokens.",
    )


def _export_kv_arguments(parser: Any) -> None:
    parser.add_argument("source", help="Folder of an adapter, or an adapter on the Hub (user/name).")
    parser.add_argument("target", help="File to write (.safetensors); it must not exist yet.")
    parser.add_argument("--model", help="Base model: a folder or a name on the Hub; overrides the adapter.")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="Dtype of the keys and values in the file (default: %(default)s).",
    )
    parser.add_argument(
        "--max_tokens",
        type=_positive_int,
        metavar="TOKENS",
        help="Largest number of tokens, prompt and answer, that the file will be used for (default: the whole "
        "context). A model with a sliding window needs it.",
    )


def _new_folder_argument(parser: Any) -> None:
    parser.add_argument("target", help="Folder to create; it must not exist yet.")


def _run_module_arguments(parser: Any) -> None:
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        required=True,
        help="The module to run (such as lm_eval), and all of its arguments.",
    )


def _serve_arguments(parser: Any) -> None:
    parser.add_argument("base", help="Base model: a folder or a name on the Hub. Requests name it like this.")
    parser.add_argument(
        "adapters",
        nargs="*",
        metavar="NAME=FOLDER",
        help="An adapter (a folder, or user/name on the Hub), and the name that requests use; without NAME= the "
        "folder is the name.",
    )
    parser.add_argument("--host", default="localhost", help="Address to listen on (default: %(default)s).")
    parser.add_argument("--port", type=_positive_int, default=8000, help="Port to listen on (default: %(default)s).")
    parser.add_argument("--device", default="auto", help="Device, such as cuda:1 or cpu (default: %(default)s).")
    parser.add_argument("--dtype", default="auto", help="Dtype of the base model (default: that of its weights).")
    parser.add_argument("--attn_implementation", metavar="NAME", help="Attention implementation, such as eager.")
    parser.add_argument(
        "--continuous_batching",
        action="store_true",
        help="Answer the requests for a model together, on a cache of blocks (decoders, with sdpa or eager).",
    )
    parser.add_argument(
        "--num_blocks",
        type=_positive_int,
        metavar="BLOCKS",
        help="Blocks in each model's cache of continuous batching (default: as many as memory has, in equal shares).",
    )
    _trust_argument(parser)


def _push_arguments(parser: Any) -> None:
    parser.add_argument("folder", help="Folder that `train` wrote, or the folder of any saved adapter.")
    parser.add_argument("repo_id", help="Repository (user/name); created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument(
        "--commit_message",
        default="Upload prefix adapter",
        help="Message of the commit (default: %(default)s).",
    )


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


class _Command(NamedTuple):
    """A command.

    Attributes:
        run: The function that runs it. Its docstring is the command's help.
        add_arguments: The function that adds its arguments to a parser.
        has_recipe: Whether every key of a recipe is an option.
        keeps_errors: Whether all errors keep their traceback, because they are those of another program.
    """

    run: Callable[[Any], None]
    add_arguments: Callable[[Any], None]
    has_recipe: bool = False
    keeps_errors: bool = False

    @property
    def help(self) -> str:
        """The help. Its first line is the summary in the list of commands."""
        return inspect.getdoc(self.run) or ""


COMMANDS = {
    "train": _Command(_train, _train_arguments, has_recipe=True),
    "distil": _Command(_distil, _distil_arguments, has_recipe=True),
    "train-together": _Command(_train_together, _train_together_arguments),
    "search": _Command(_search, _search_arguments, has_recipe=True),
    "evaluate": _Command(_evaluate, _evaluate_arguments),
    "predict": _Command(_predict, _predict_arguments),
    "info": _Command(_info, _info_arguments),
    "fold": _Command(_fold, _fold_arguments),
    "join": _Command(_join, _join_arguments),
    "import": _Command(_import, _import_arguments),
    "export": _Command(_export, _export_arguments),
    "export-kv": _Command(_export_kv, _export_kv_arguments),
    "push": _Command(_push, _push_arguments),
    "serve": _Command(_serve, _serve_arguments),
    "run": _Command(_run_module, _run_module_arguments, keeps_errors=True),
}


# ---- Parsing


def _overview() -> str:
    commands = "\n".join(f"  {name:16}{command.help.splitlines()[0]}" for name, command in COMMANDS.items())
    return f"""usage: prefix-adapter COMMAND ...

Train, evaluate, use and publish P-Tuning v2 adapters.

{commands}

Run `prefix-adapter COMMAND --help` for the arguments of a command, `prefix-adapter --version` for the version."""


def _parser(name: str) -> Any:
    """The parser of a command: argparse's, or jsonargparse's for commands with an option for every recipe key."""
    command = COMMANDS[name]
    parser_class: Any = argparse.ArgumentParser
    formatter: Any = argparse.RawDescriptionHelpFormatter
    epilog = None
    if command.has_recipe:
        try:
            from jsonargparse import ArgumentParser, DefaultHelpFormatter
        except ImportError as error:
            raise SystemExit('The command needs more packages: pip install "prefix-adapter[train]"') from error
        parser_class, epilog = ArgumentParser, _epilog()
        formatter = type("Formatter", (formatter, DefaultHelpFormatter), {})  # keeps the line breaks of descriptions
    parser = type("Parser", (parser_class,), {"error": _error})(
        prog=f"prefix-adapter {name}",
        description=command.help,
        epilog=epilog,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument(
        "--debug", action="store_true", help=f"Show the traceback of an error, as {DEBUG}=1 in the environment does."
    )
    return parser


def _epilog() -> str:
    from .training.recipe import recipe_names
    from .training.settings import TASK_SETTINGS

    settings = "".join(
        f"\n  {task}" + "".join(f"\n    {name} ({default}): {text}" for name, (default, text) in own.items())
        for task, own in TASK_SETTINGS.items()
    )
    return f"Keys of task_kwargs, with their defaults:{settings}\n\nRecipes of the package:\n  " + "\n  ".join(
        recipe_names()
    )


def _error(parser: Any, message: str, ex: Exception | None = None) -> NoReturn:
    """Print what is wrong with the arguments and how to get help, in two lines; exit with code 2."""
    print(f"{parser.prog}: {_printable(_rephrase(parser, message))}\nTry `{parser.prog} --help`.", file=sys.stderr)
    raise SystemExit(2)


_PARSER_MESSAGES = (
    (r"argument (\S+): expected one argument", "{0} needs a value."),
    (r"argument (\S+): invalid _positive_int value: (.*)", "{0} must be a whole number of at least 1, got {1}."),
    (r"argument (\S+): invalid choice: (\S+) \(choose from (.*)\)", "{0} must be one of {2}, got {1}."),
    (r"argument (\S+: .*)", "{0}"),
    (r"(?:the following arguments are required: |.*required.*?[:\"] ?)(.*)", "there must be a value for {0}."),
)
"""Patterns of the messages of argparse and jsonargparse, and what `_rephrase` makes of them."""


def _rephrase(parser: Any, message: str) -> str:
    """Rewrite an error message of argparse or jsonargparse so that it names the option, the value and the fix."""
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        options = [each for each in found[1].split() if each.startswith("-")]
        if not options:
            return f"unexpected argument {found[1].split()[0]!r}."
        name = options[0].partition("=")[0]
        known = re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", parser.format_help())
        return f"there is no option {name}.{did_you_mean(name, known)}"
    if found := re.match(r'Parser key "([\w.]+)":', message):
        key = found[1]
        value = re.search(r"(?:Got value:|Given value:|Unable to load config) (.*)", message)
        return f"--{key} must be {_expected_value(key)}" + (f", got {value[1].strip()}." if value else ".")
    for pattern, text in _PARSER_MESSAGES:
        if found := re.match(pattern, message, re.DOTALL):
            return text.format(*found.groups())
    return message


def _expected_value(key: str) -> str:
    """Describe the values that a key of a recipe or a search can have."""
    from .training.recipe import Data, Recipe
    from .training.settings import Search, SelfStudy

    group, _, name = key.rpartition(".")
    hints = get_type_hints({"data": Data, "search": Search, "study": SelfStudy}.get(group, Recipe))
    return _describe_type(hints[name]) if name in hints else "of another type"


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is Union:
        parts = [each for each in get_args(hint) if each is not type(None)]
        null = " or null" if len(parts) < len(get_args(hint)) else ""
        return " or ".join(map(_describe_type, parts)) + null
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a mapping, such as '{key: value}'",
        list: "a list, such as '[a, b]'",
    }
    return names.get(get_origin(hint) or hint, "a mapping")


def _recipe_of_run(folder: str) -> str:
    """The path of the recipe in the output folder of a run. If there is none, exit with a message."""
    path = os.path.join(folder, "recipe.yaml")
    if not os.path.isfile(path):
        raise SystemExit(f"prefix-adapter: --resume: there is no run in {folder!r} (no recipe.yaml).")
    return path


def _with_recipe_of_run(arguments: list[str]) -> list[str]:
    """Add the recipe and the output folder of a run to `train --resume FOLDER`."""
    result: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, folder = argument.partition("=")
        if name == "--resume":
            folder = folder or next(iter(arguments[place + 1 :]), "")
            if not folder:
                return arguments  # the parser reports the missing value
            result += ["--config", _recipe_of_run(folder), "--output_dir", folder]
        result.append(argument)
    return result


def _command_name(arguments: list[str]) -> str:
    """The name of the command. For `--help`, `--version` and unknown commands, print an answer and exit."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0)
    if name == "--version":
        from .version import __version__

        print(__version__)
        raise SystemExit(0)
    if name not in COMMANDS:
        hint = did_you_mean(name, list(COMMANDS))
        text = f"prefix-adapter: there is no command {name!r}.{hint}\nThe commands are {', '.join(COMMANDS)}."
        print(text if name else _overview(), file=sys.stderr)
        raise SystemExit(2)
    return name


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command and its arguments; by default those of the process (`sys.argv[1:]`).

    Raises:
        SystemExit: With code 2 and two lines for wrong arguments; with code 1 and the error's message for errors that
            the user can fix (arguments, files, rows, network, memory); with 128 plus the signal's number when a
            signal stopped the command.

    Other errors, and with `--debug` all errors, keep their traceback.

    Example:
        >>> main(["info", "runs/ner"])
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    name, rest = _command_name(given), given[1:]
    if not sys.stderr.isatty() or "--quiet" in rest:
        _hide_bars()
    options = _parser(name).parse_args(_with_recipe_of_run(rest) if name == "train" else rest)
    options.arguments = rest
    debug = options.debug or os.environ.get(DEBUG, "") not in ("", "0")
    try:
        COMMANDS[name].run(options)
    except Exception as error:
        if debug or COMMANDS[name].keeps_errors or not _is_user_error(error):
            raise
        _exit_with_message(name, error)
    except KeyboardInterrupt as error:
        if _is_first_process():
            print(f"prefix-adapter {name}: {error or 'Stopped.'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _hide_bars() -> None:
    """Have the libraries show no bars of their own; they read these variables when they are imported, later."""
    for library in ("HF_HUB", "HF_DATASETS"):  # transformers follows the first one
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _is_user_error(error: Exception) -> bool:
    """Whether the user can fix an error: one of arguments, files, rows, the network or memory."""
    # RecipeError, DataError and UnsupportedBackboneError are ValueErrors. The other classes are compared by name,
    # because their modules import torch.
    known = (ValueError, OSError, ImportError, MemoryError)
    names = ("TrainingDiverged", "TrainingInterrupted", "PrefixNotUsedError", "OutOfMemoryError", "SafetensorError")
    return (
        isinstance(error, known)
        or type(error).__name__ in names
        or type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx")
    )


def _exit_with_message(name: str, error: Exception) -> NoReturn:
    """End the process with the message of an error and no traceback."""
    if type(error).__name__ == "TrainingInterrupted":
        if _is_first_process():
            print(_printable(error), file=sys.stderr)
        raise SystemExit(128 + (getattr(error, "signal_number", None) or 0)) from None
    raise SystemExit(_printable(f"prefix-adapter {name}: {error}") if _is_first_process() else 1) from error


if __name__ == "__main__":
    main()
