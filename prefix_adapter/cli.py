"""The command `prefix-adapter`, from a data set to a published adapter.

Nothing that imports torch is imported before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

DEBUG = "PREFIX_ADAPTER_DEBUG"
"""The environment variable that does what `--debug` does."""
TRAIN = """Train an adapter.

A recipe says what and how: a YAML file, or the name of one that comes with the package; options on the command line
override it. Several GPUs or machines: accelerate launch -m prefix_adapter train ...

  prefix-adapter train --config token-classification --model bert-base-cased \\
      --data.train train.jsonl --data.validation dev.jsonl --output_dir runs/pos --adapter.num_virtual_tokens 40
  prefix-adapter train --resume runs/pos

The output folder then has the adapter, its model card, metrics.jsonl, curve.png and the exact recipe.
"""
TOGETHER = """Train one prefix for several tasks, each with a head of its own, and leave an adapter for each.

The recipe is a YAML file with the keys that the tasks share, and under `tasks` those that each has for itself:

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
SEARCH = """Look for the best settings of a recipe with Optuna; ends with the best recipe as YAML.

By default table or MLP, learning rate, length and dropout of the prefix are varied. What is set by an option of the
command line stays as set; what the file of --config says about these keys is where their default would be.

  prefix-adapter search --config token-classification --model bert-base-cased --data.train train.jsonl \\
      --output_dir runs/search --search.n_trials 30
"""
IMPORT = """Make an adapter of a checkpoint of THUDM/P-tuning-v2, or of a PREFIX_TUNING adapter of PEFT's.

  prefix-adapter import checkpoint/pytorch_model.bin ner --model bert-base-cased --task_type TOKEN_CLS
  prefix-adapter import peft-adapter ner

Both with their task heads. The base model is loaded in float32. An adapter of PEFT's is tried out on it beside the new
one, and a checkpoint's backbone compared with it; what cannot be carried over is refused, with the reason.
"""
EXPORT = """Make a PREFIX_TUNING adapter of PEFT's of a saved adapter, with its task head.

  prefix-adapter export ner peft-adapter

PEFT has one prefix for every layer of a model or decoder, and always moves the positions of the input behind it: an
adapter to export is trained with `shift_positions: true`. An MLP is folded. The base model is loaded in float32, and
both adapters are tried out on it; what PEFT cannot express is refused, with the reason.
"""
EVALUATE = """Measure a trained adapter on rows with solutions.

  prefix-adapter evaluate runs/ner                  the run's own test rows, or its validation rows
  prefix-adapter evaluate runs/ner other.jsonl

The result says which rows were measured. From the recipe in the adapter's folder only harmless settings are taken;
--config names a recipe that you trust.
"""
PREDICT = """Answer the rows of a JSONL file of any size; the answers are added to the rows.

From the recipe in the adapter's folder only harmless settings are taken; --config names a
recipe that you trust.
"""


# ---- The commands


def _train(options: Any) -> None:
    from .training.recipe import recipe_from

    recipe = recipe_from(options)  # mistakes in it are told before torch is imported
    from .training.run import train

    results = train(recipe, resume=options.resume is not None, overwrite=options.overwrite)
    if _first():
        _show({split: results[split] for split in ("validation", "test") if split in results})
        print(f"The adapter is in {recipe.output_dir}.")


def _train_together(options: Any) -> None:
    if (options.config is None) == (options.resume is None) or (options.resume and options.output_dir):
        raise ValueError("give either --config, a recipe, and perhaps --output_dir, or --resume, the folder of a run.")
    from .training.multitask import load_joint_recipe, train_together

    trust = {"trust_remote_code": options.trust_remote_code}
    if options.resume is None:
        output_dir = {} if options.output_dir is None else {"output_dir": options.output_dir}
        recipe = load_joint_recipe(options.config, **output_dir, **trust)
    else:
        path = Path(options.resume, "recipe.yaml")
        if not path.is_file():
            raise ValueError(f"--resume: there is no run in {options.resume!r} (it has no recipe.yaml).")
        recipe = load_joint_recipe(path, output_dir=options.resume, **trust)
    results = train_together(recipe, resume=options.resume is not None, overwrite=options.overwrite)
    if _first():
        splits = ("validation", "test")
        _show({name: {key: own[key] for key in splits if key in own} for name, own in results["tasks"].items()})
        print(f"The adapters are in {recipe.output_dir}.")


def _search(options: Any) -> None:
    from .training.recipe import recipe_from
    from .training.settings import Search

    recipe, settings = recipe_from(options), Search(**vars(options.search))
    settings.fixed += [key for key in _keys_set(options) if key not in settings.fixed]
    from .training.search import search

    _show(search(recipe, settings, resume=options.resume))


def _keys_set(options: Any) -> list[str]:
    """The keys of the recipe that the command line sets."""
    keys: list[str] = []
    for argument in options.arguments:
        name = argument[2:].partition("=")[0] if argument.startswith("--") else ""
        value = options.get(name) if name else None
        if name.partition(".")[0] in options and name.partition(".")[0] not in ("config", "resume", "search", "debug"):
            keys += [f"{name}.{each}" for each in value] if isinstance(value, dict) else [name]
    return keys


def _evaluate(options: Any) -> None:
    from .training.inference import evaluate_adapter

    metrics = evaluate_adapter(
        options.adapter,
        options.data,
        model=options.model,
        revision=options.revision,
        batch_size=options.batch_size,
        predictions=options.predictions,
        overwrite=options.overwrite,
        config=options.config,
        trust_remote_code=options.trust_remote_code,
    )
    if _first():
        _show({"split": metrics.split, "source": metrics.source, "rows": metrics.rows, **metrics})


def _predict(options: Any) -> None:
    from .training.inference import predict

    count = predict(
        options.adapter,
        options.source,
        options.target,
        model=options.model,
        revision=options.revision,
        batch_size=options.batch_size,
        chunk_size=options.chunk_size,
        device=options.device,
        overwrite=options.overwrite,
        config=options.config,
        trust_remote_code=options.trust_remote_code,
    )
    print(f"{count} rows answered.", file=sys.stderr)


def _info(options: Any) -> None:
    from . import api  # noqa: F401 (PEFT reads configurations of the methods that it knows)
    from .adapters.saved import describe_adapter

    found = describe_adapter(options.adapter, options.revision)
    if options.json:
        _show(found)
        return
    for name in ("peft_type", "base_model", "task_type"):
        print(f"{name:20}{_plain(found[name])}")
    for name, value in found["settings"].items():
        print(f"{_plain(name):20}{_plain(value)}")
    for part, count in found["parameters"].items():
        print(f"{part + ' parameters':20}{count:,}")
    print(f"{'file':20}{found['bytes']:,} bytes")
    for name, tensor in found["tensors"].items():
        print(f"    {'x'.join(map(str, tensor['shape'])):16}{tensor['dtype']:8}{_plain(name)}")


def _fold(options: Any) -> None:
    from .adapters.saved import fold

    print(f"Folded into {fold(options.source, options.target)}.")


def _import(options: Any) -> None:
    from .adapters.exchange import import_peft
    from .adapters.ptuning_v2 import import_ptuning_v2

    source = Path(options.source)
    if source.is_file() or (source.is_dir() and not (source / "adapter_config.json").is_file()):
        target = import_ptuning_v2(source, options.target, options.model, options.task_type)
    elif options.task_type:
        raise ValueError("--task_type is for checkpoints of P-tuning-v2: an adapter of PEFT's says its own.")
    else:
        target = import_peft(options.source, options.target, options.model)
    print(f"Imported into {target}.")


def _export(options: Any) -> None:
    from .adapters.exchange import export_peft

    print(f"Exported to {export_peft(options.source, options.target, options.model)}.")


def _push(options: Any) -> None:
    from .adapters.hub import push_to_hub

    private = True if options.private else None
    commit = push_to_hub(options.folder, options.repo_id, private=private, commit_message=options.commit_message)
    print(commit.commit_url)


def _first() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return int(os.environ.get("RANK", 0)) == 0


def _show(values: Any) -> None:
    print(_plain(json.dumps(values, indent=2, ensure_ascii=False)))


def _plain(value: Any) -> str:
    """A value as text in which nothing controls a terminal: what somebody else wrote may hold any character."""
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in str(value))


# ---- Their arguments


def _train_arguments(parser: Any) -> None:
    from .training.recipe import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("--resume", metavar="FOLDER", help="Resume the run in this folder; its own recipe is used.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the run that is in the output folder.")


def _search_arguments(parser: Any) -> None:
    from .training.recipe import add_recipe_arguments
    from .training.settings import Search

    add_recipe_arguments(parser)
    parser.add_class_arguments(Search, "search")
    parser.add_argument("--resume", action="store_true", help="Resume the search in the output folder.")


def _together_arguments(parser: Any) -> None:
    parser.add_argument("--config", metavar="FILE", help="A recipe (YAML).")
    parser.add_argument("--output_dir", metavar="FOLDER", help="The output folder, if it is not the recipe's.")
    parser.add_argument("--resume", metavar="FOLDER", help="Resume the run in this folder, by its own recipe.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the run that is in the output folder.")
    _trust_argument(parser)


def _evaluate_arguments(parser: Any) -> None:
    _adapter_arguments(parser)
    parser.add_argument(
        "data", nargs="?", help="A file, or test, validation or train: the rows that the run used as such."
    )
    parser.add_argument("--predictions", metavar="FILE", help="A JSONL file for the rows with their answers.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file of predictions if it exists.")


def _predict_arguments(parser: Any) -> None:
    _adapter_arguments(parser)
    parser.add_argument("source", help="A file with a JSON object in each line; - for standard input.")
    parser.add_argument("target", help="A file for the rows with `prediction` added; - for standard output.")
    parser.add_argument(
        "--chunk_size", type=_count, default=1000, metavar="ROWS", help="Rows in memory at a time; %(default)s."
    )
    parser.add_argument("--device", help="Where to compute; a GPU if there is one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the target if it exists.")


def _adapter_arguments(parser: Any) -> None:
    parser.add_argument("adapter", help="The folder that `train` left, or the adapter's name on the Hub.")
    parser.add_argument("--model", help="The base model, if it is not where the recipe says.")
    parser.add_argument("--revision", help="The adapter's revision on the Hub.")
    parser.add_argument(
        "--batch_size", type=_count, metavar="ROWS", help="Rows of a forward pass; by default the recipe's."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="A recipe that you trust, in place of the one in the adapter's folder."
    )
    _trust_argument(parser)


def _trust_argument(parser: Any) -> None:
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="Run the Python code that the base model's repository contains. No file can set this.",
    )


def _info_arguments(parser: Any) -> None:
    parser.add_argument("adapter", help="A folder, or a name on the Hub.")
    parser.add_argument("--revision", help="The revision on the Hub.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _fold_arguments(parser: Any) -> None:
    parser.add_argument("source", help="A folder, or a name on the Hub.")
    parser.add_argument("target", help="A folder that does not exist yet.")


def _import_arguments(parser: Any) -> None:
    parser.add_argument("source", help="A run's folder or checkpoint file; an adapter's folder or name on the Hub.")
    parser.add_argument("target", help="A folder that does not exist yet.")
    parser.add_argument("--model", help="The base model, if it is not where the source says.")
    parser.add_argument(
        "--task_type",
        choices=["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION"],
        help="What a checkpoint was trained for, if its config.json does not say; FEATURE_EXTRACTION takes the prefix "
        "alone, without the head.",
    )


def _export_arguments(parser: Any) -> None:
    _fold_arguments(parser)
    parser.add_argument("--model", help="The base model, if it is not where the adapter says.")


def _push_arguments(parser: Any) -> None:
    parser.add_argument("folder", help="The folder that `train` left, or any saved adapter's.")
    parser.add_argument("repo_id", help="user/name; it is created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--commit_message", default="Upload prefix adapter")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


class _Command(NamedTuple):
    summary: str
    run: Callable[[Any], None]
    arguments: Callable[[Any], None]
    description: str
    has_recipe: bool = False
    """Whether every key of a recipe is an option."""


COMMANDS = {
    "train": _Command("train an adapter", _train, _train_arguments, TRAIN, True),
    "train-together": _Command("train one prefix for several tasks", _train_together, _together_arguments, TOGETHER),
    "search": _Command("look for the best settings", _search, _search_arguments, SEARCH, True),
    "evaluate": _Command("measure a trained adapter", _evaluate, _evaluate_arguments, EVALUATE),
    "predict": _Command("answer rows", _predict, _predict_arguments, PREDICT),
    "info": _Command(
        "what an adapter file holds", _info, _info_arguments, "Say what a saved adapter holds; no model is loaded."
    ),
    "fold": _Command(
        "make an adapter small",
        _fold,
        _fold_arguments,
        "Turn the MLP of a saved adapter into the table that it computes: the same outputs, a small file.",
    ),
    "import": _Command("take over an adapter of P-tuning-v2's or PEFT's", _import, _import_arguments, IMPORT),
    "export": _Command("make an adapter for PEFT alone", _export, _export_arguments, EXPORT),
    "push": _Command(
        "publish an adapter",
        _push,
        _push_arguments,
        "Upload an adapter's folder to the Hub, checkpoints and logs left out.",
    ),
}


# ---- Reading them


def _overview() -> str:
    return "\n".join(
        (
            "usage: prefix-adapter COMMAND ...",
            "",
            "P-Tuning v2 adapters: train, measure, use, publish.",
            "",
            *(f"  {name:16}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "prefix-adapter COMMAND --help says what a command needs; prefix-adapter --version which version this is.",
        )
    )


def _parser(name: str) -> Any:
    """The parser of a command: argparse's, or jsonargparse's where every key of a recipe is an option."""
    command = COMMANDS[name]
    settings: dict[str, Any] = {
        "prog": f"prefix-adapter {name}",
        "description": command.description,
        "allow_abbrev": False,
    }
    if command.has_recipe:
        try:
            from jsonargparse import ArgumentParser, DefaultHelpFormatter
        except ImportError as error:
            raise SystemExit('The command needs more packages: pip install "prefix-adapter[train]"') from error

        class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
            """jsonargparse's, with the line breaks of descriptions left as they are."""

        class Parser(ArgumentParser):
            error = _error

        parser: Any = Parser(**settings, formatter_class=Formatter, epilog=_epilog())
    else:

        class PlainParser(argparse.ArgumentParser):
            error = _error

        parser = PlainParser(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.arguments(parser)
    parser.add_argument(
        "--debug", action="store_true", help=f"Show where in the program an error comes from; as {DEBUG}=1 does."
    )
    return parser


def _epilog() -> str:
    from .training.recipe import recipe_names
    from .training.settings import TASK_SETTINGS

    settings = "".join(
        f"\n  {task}" + "".join(f"\n    {name} ({default}): {text}" for name, (default, text) in own.items())
        for task, own in TASK_SETTINGS.items()
    )
    return f"task_kwargs, with their defaults:{settings}\n\nrecipes:\n  " + "\n  ".join(recipe_names())


def _error(parser: Any, message: str, ex: Exception | None = None) -> NoReturn:
    """End with two lines: what is wrong with the arguments, and where help is."""
    print(f"{parser.prog}: {_plain(_in_our_words(parser, message))}\nTry `{parser.prog} --help`.", file=sys.stderr)
    raise SystemExit(2)


def _in_our_words(parser: Any, message: str) -> str:
    """What a parser says about an argument: the option, what was given, what is wanted."""
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        options = [each for each in found[1].split() if each.startswith("-")]
        if not options:
            return f"unexpected argument {found[1].split()[0]!r}."
        name = options[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        return f"there is no option {name}.{_did_you_mean(name, known)}"
    if found := re.match(r"argument (\S+): expected one argument", message):
        return f"{found[1]} needs a value."
    if found := re.match(r"argument (\S+): invalid _count value: (.*)", message):
        return f"{found[1]} must be a whole number of at least 1, got {found[2]}."
    if found := re.match(r"argument (\S+): invalid choice: (\S+) \(choose from (.*)\)", message):
        return f"{found[1]} must be one of {found[3]}, got {found[2]}."
    if found := re.match(r"argument (\S+: .*)", message, re.DOTALL):
        return found[1]
    if found := re.match(r'Parser key "([\w.]+)":', message):
        wanted, given = (
            _wanted(found[1]),
            re.search(r"(?:Got value:|Given value:|Unable to load config) (.*)", message),
        )
        return f"--{found[1]} must be {wanted}" + (f", got {given[1].strip()}." if given else ".")
    if found := re.match(r"(?:the following arguments are required: |.*required.*?[:\"] ?)(.*)", message, re.DOTALL):
        return f"there must be a value for {found[1]}."
    return message


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _wanted(key: str) -> str:
    """What a key of a recipe or of a search can be, in words."""
    from .training.recipe import Data, Recipe
    from .training.settings import Search

    group, _, name = key.rpartition(".")
    hints = get_type_hints({"data": Data, "search": Search}.get(group, Recipe))
    return _words(hints[name]) if name in hints else "of another type"


def _words(hint: Any) -> str:
    if get_origin(hint) is Union:
        parts = [each for each in get_args(hint) if each is not type(None)]
        null = " or null" if len(parts) < len(get_args(hint)) else ""
        return " or ".join(map(_words, parts)) + null
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


def _with_recipe(arguments: list[str]) -> list[str]:
    """`train --resume FOLDER` reads the recipe that is in FOLDER."""
    result: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, folder = argument.partition("=")
        if name == "--resume":
            folder = folder or next(iter(arguments[place + 1 :]), "")
            if not folder:
                return arguments  # the parser says what is missing
            recipe = os.path.join(folder, "recipe.yaml")
            if not os.path.isfile(recipe):
                raise SystemExit(f"prefix-adapter train: --resume: there is no run in {folder!r} (no recipe.yaml).")
            result += ["--config", recipe, "--output_dir", folder]
        result.append(argument)
    return result


def _command_of(arguments: list[str]) -> str:
    """The command that is called; help and the version end the process here."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0)
    if name == "--version":
        from .version import __version__

        print(__version__)
        raise SystemExit(0)
    if name not in COMMANDS:
        if not name:
            print(_overview(), file=sys.stderr)
        else:
            print(
                f"prefix-adapter: there is no command {name!r}.{_did_you_mean(name, list(COMMANDS))}\n"
                f"There are {', '.join(COMMANDS)}.",
                file=sys.stderr,
            )
        raise SystemExit(2)
    return name


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors that a user can mend end in one message and exit code 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name, rest = _command_of(given), given[1:]
    options = _parser(name).parse_args(_with_recipe(rest) if name == "train" else rest)
    options.arguments = rest
    debug = options.debug or os.environ.get(DEBUG, "") not in ("", "0")
    try:
        COMMANDS[name].run(options)
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        _end(name, error)
    except KeyboardInterrupt as error:
        if _first():
            print(f"prefix-adapter {name}: {error or 'Stopped.'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _is_expected(error: Exception) -> bool:
    """Whether an error is one that a user can mend: of the arguments, files, rows, the network, or memory."""
    # RecipeError, DataError and UnsupportedBackboneError are ValueErrors.
    known = (ValueError, OSError, ImportError, MemoryError)
    names = ("TrainingDiverged", "TrainingInterrupted", "PrefixNotUsedError", "OutOfMemoryError", "SafetensorError")
    return (
        isinstance(error, known)
        or type(error).__name__ in names
        or type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx")
    )


def _end(name: str, error: Exception) -> NoReturn:
    """End the process with an error's message and no traceback."""
    code = 1
    if type(error).__name__ == "TrainingInterrupted":
        text, code = str(error), 128 + (getattr(error, "signal_number", None) or 0)
    else:
        text = f"prefix-adapter {name}: {error}"
    if code == 1:
        raise SystemExit(_plain(text) if _first() else 1) from error
    if _first():
        print(_plain(text), file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
