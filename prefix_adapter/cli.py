"""The command `prefix-adapter`, from a data set to a published adapter."""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

try:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
except ImportError as error:
    raise SystemExit('The command needs more packages: pip install "prefix-adapter[train]"') from error

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


def _train(options: Namespace) -> None:
    from .training import train
    from .training.recipe import recipe_from

    results = train(recipe_from(options), resume=options.resume is not None, overwrite=options.overwrite)
    if _first():
        _show({split: results[split] for split in ("validation", "test") if split in results})
        print(f"The adapter is in {options.output_dir}.")


def _train_together(options: Namespace) -> None:
    from .training import load_joint_recipe, train_together

    if (options.config is None) == (options.resume is None) or (options.resume and options.output_dir):
        raise ValueError("give either --config, a recipe, and perhaps --output_dir, or --resume, the folder of a run.")
    if options.resume is None:
        output_dir = {} if options.output_dir is None else {"output_dir": options.output_dir}
        recipe = load_joint_recipe(options.config, **output_dir)
    else:
        path = Path(options.resume, "recipe.yaml")
        if not path.is_file():
            raise ValueError(f"--resume: there is no run in {options.resume!r} (it has no recipe.yaml).")
        recipe = load_joint_recipe(path, output_dir=options.resume)
    results = train_together(recipe, resume=options.resume is not None, overwrite=options.overwrite)
    if _first():
        splits = ("validation", "test")
        _show({name: {key: own[key] for key in splits if key in own} for name, own in results["tasks"].items()})
        print(f"The adapters are in {recipe.output_dir}.")


def _search(options: Namespace) -> None:
    from .training.recipe import recipe_from
    from .training.search import search

    _show(search(recipe_from(options), options.search, resume=options.resume))


def _evaluate(options: Namespace) -> None:
    from .training.inference import evaluate_adapter

    metrics = evaluate_adapter(
        options.adapter,
        options.data,
        model=options.model,
        revision=options.revision,
        batch_size=options.batch_size,
        predictions=options.predictions,
        overwrite=options.overwrite,
    )
    if _first():
        _show(metrics)


def _predict(options: Namespace) -> None:
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
    )
    print(f"{count} rows answered.", file=sys.stderr)


def _info(options: Namespace) -> None:
    from .info import describe

    found = describe(options.adapter, options.revision)
    if options.json:
        _show(found)
        return
    for name in ("peft_type", "base_model", "task_type"):
        print(f"{name:20}{found[name]}")
    for name, value in found["settings"].items():
        print(f"{name:20}{value}")
    for part, count in found["parameters"].items():
        print(f"{part + ' parameters':20}{count:,}")
    print(f"{'file':20}{found['bytes']:,} bytes")
    for name, tensor in found["tensors"].items():
        print(f"    {'x'.join(map(str, tensor['shape'])):16}{tensor['dtype']:8}{name}")


def _fold(options: Namespace) -> None:
    from .convert import fold

    print(f"Folded into {fold(options.source, options.target)}.")


def _import(options: Namespace) -> None:
    from .exchange import import_peft, import_ptuning_v2

    source = Path(options.source)
    if source.is_file() or (source.is_dir() and not (source / "adapter_config.json").is_file()):
        target = import_ptuning_v2(source, options.target, options.model, options.task_type)
    elif options.task_type:
        raise ValueError("--task_type is for checkpoints of P-tuning-v2: an adapter of PEFT's says its own.")
    else:
        target = import_peft(options.source, options.target, options.model)
    print(f"Imported into {target}.")


def _export(options: Namespace) -> None:
    from .exchange import export_peft

    print(f"Exported to {export_peft(options.source, options.target, options.model)}.")


def _push(options: Namespace) -> None:
    from .hub import push_to_hub

    private = True if options.private else None
    commit = push_to_hub(options.folder, options.repo_id, private=private, commit_message=options.commit_message)
    print(commit.commit_url)


def _first() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return int(os.environ.get("RANK", 0)) == 0


def _show(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def _parser() -> ArgumentParser:
    from .training.recipe import add_recipe_arguments, recipe_names
    from .training.search import Search
    from .training.tasks import TASK_CLASSES

    description = "P-Tuning v2 adapters: train, measure, use, publish."
    # The formatter is that of all commands: jsonargparse gives it to them.
    parser = ArgumentParser(prog="prefix-adapter", description=description, formatter_class=_Formatter)
    commands = parser.add_subcommands(required=True, dest="command")

    settings = "".join(
        f"\n  {task}" + "".join(f"\n    {name} ({default}): {text}" for name, (default, text) in own.settings.items())
        for task, own in TASK_CLASSES.items()
    )
    epilog = f"task_kwargs, with their defaults:{settings}\n\nrecipes:\n  " + "\n  ".join(recipe_names())
    train = _command(TRAIN, epilog)
    add_recipe_arguments(train)
    train.add_argument("--resume", metavar="FOLDER", help="Go on with the run in this folder; its own recipe is used.")
    train.add_argument("--overwrite", action="store_true", help="Replace the run that is in the output folder.")
    commands.add_subcommand("train", train, help="train an adapter")

    together = _command(TOGETHER)
    together.add_argument("--config", type=str, help="A recipe (YAML).")
    together.add_argument("--output_dir", type=str, help="The output folder, if it is not the recipe's.")
    together.add_argument("--resume", metavar="FOLDER", help="Go on with the run in this folder, by its own recipe.")
    together.add_argument("--overwrite", action="store_true", help="Replace the run that is in the output folder.")
    commands.add_subcommand("train-together", together, help="train one prefix for several tasks")

    search = _command("Look for the best settings of a recipe with Optuna; ends with the best recipe as YAML.", epilog)
    add_recipe_arguments(search)
    search.add_class_arguments(Search, "search")
    search.add_argument("--resume", action="store_true", help="Go on with the search in the output folder.")
    commands.add_subcommand("search", search, help="look for the best settings")

    evaluate = _command("Measure a trained adapter on rows with solutions.")
    _adapter_arguments(evaluate)
    evaluate.add_argument(
        "data", nargs="?", type=str, help="A file, or test, validation or train: the recipe's own rows."
    )
    evaluate.add_argument("--predictions", type=str, help="A JSONL file for the rows with their answers.")
    evaluate.add_argument("--overwrite", action="store_true", help="Replace the file of predictions if it exists.")
    commands.add_subcommand("evaluate", evaluate, help="measure a trained adapter")

    predict = _command("Answer the rows of a JSONL file of any size; the answers are added to the rows.")
    _adapter_arguments(predict)
    predict.add_argument("source", type=str, help="A file with a JSON object in each line; - for standard input.")
    predict.add_argument(
        "target", type=str, help="A file for the rows with `prediction` added; - for standard output."
    )
    predict.add_argument("--chunk_size", type=int, default=1000, help="Rows that are in memory at a time.")
    predict.add_argument("--device", type=str, help="Where to compute; a GPU if there is one.")
    predict.add_argument("--overwrite", action="store_true", help="Replace the target if it exists.")
    commands.add_subcommand("predict", predict, help="answer rows")

    info = _command("Say what a saved adapter holds; no model is loaded.")
    info.add_argument("adapter", type=str, help="A folder, or a name on the Hub.")
    info.add_argument("--revision", type=str, help="The revision on the Hub.")
    info.add_argument("--json", action="store_true", help="Print JSON.")
    commands.add_subcommand("info", info, help="what an adapter file holds")

    fold = _command("Turn the MLP of a saved adapter into the table that it computes: the same outputs, a small file.")
    fold.add_argument("source", type=str, help="A folder, or a name on the Hub.")
    fold.add_argument("target", type=str, help="A folder that does not exist yet.")
    commands.add_subcommand("fold", fold, help="make an adapter small")

    import_ = _command(IMPORT)
    import_.add_argument(
        "source", type=str, help="A run's folder or checkpoint file; an adapter's folder or name on the Hub."
    )
    import_.add_argument("target", type=str, help="A folder that does not exist yet.")
    import_.add_argument("--model", type=str, help="The base model, if it is not where the source says.")
    import_.add_argument(
        "--task_type",
        choices=["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION"],
        help="What a checkpoint was trained for, if its config.json does not say; FEATURE_EXTRACTION takes the prefix "
        "alone, without the head.",
    )
    commands.add_subcommand("import", import_, help="take over an adapter of P-tuning-v2's or PEFT's")

    export = _command(EXPORT)
    export.add_argument("source", type=str, help="A folder, or a name on the Hub.")
    export.add_argument("target", type=str, help="A folder that does not exist yet.")
    export.add_argument("--model", type=str, help="The base model, if it is not where the adapter says.")
    commands.add_subcommand("export", export, help="make an adapter for PEFT alone")

    push = _command("Upload an adapter's folder to the Hub, checkpoints and logs left out.")
    push.add_argument("folder", type=str, help="The folder that `train` left, or any saved adapter's.")
    push.add_argument("repo_id", type=str, help="user/name; it is created if it does not exist.")
    push.add_argument("--private", action="store_true", help="Make a new repository private.")
    push.add_argument("--commit_message", type=str, default="Upload prefix adapter")
    commands.add_subcommand("push", push, help="publish an adapter")
    return parser


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with the line breaks of descriptions left as they are."""


def _command(description: str, epilog: str | None = None) -> ArgumentParser:
    return ArgumentParser(description=description, epilog=epilog, formatter_class=_Formatter)


def _adapter_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", type=str, help="The folder that `train` left, or the adapter's name on the Hub.")
    parser.add_argument("--model", type=str, help="The base model, if it is not where the recipe says.")
    parser.add_argument("--revision", type=str, help="The adapter's revision on the Hub.")
    parser.add_argument(
        "--batch_size", type=int, help="Rows of a forward pass; the recipe's eval_batch_size by default."
    )


def _with_recipe(arguments: list[str]) -> list[str]:
    """`train --resume FOLDER` reads the recipe that is in FOLDER."""
    if arguments[:1] != ["train"]:
        return arguments
    result: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, folder = argument.partition("=")
        if name == "--resume":
            folder = folder or (arguments[place + 1] if place + 1 < len(arguments) else "")
            recipe = os.path.join(folder, "recipe.yaml")
            if not os.path.isfile(recipe):
                raise SystemExit(f"prefix-adapter: --resume: there is no run in {folder!r} (it has no recipe.yaml).")
            result += ["--config", recipe, "--output_dir", folder]
        result.append(argument)
    return result


_COMMANDS = {
    "train": _train,
    "train-together": _train_together,
    "search": _search,
    "evaluate": _evaluate,
    "predict": _predict,
    "info": _info,
    "fold": _fold,
    "import": _import,
    "export": _export,
    "push": _push,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors that a user can mend end in one message and exit code 1."""
    from .training import TrainingDiverged, TrainingInterrupted

    parser = _parser()
    parsed = parser.parse_args(_with_recipe(sys.argv[1:] if arguments is None else arguments))
    command = parsed.command
    try:
        _COMMANDS[command](parser.instantiate(parsed)[command])
    except TrainingInterrupted as error:
        if _first():
            print(error, file=sys.stderr)
        raise SystemExit(128 + (error.signal_number or 0)) from None
    except KeyboardInterrupt as error:
        if _first():
            print(f"prefix-adapter {command}: {error or 'Stopped.'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, TrainingDiverged, OSError, ImportError) as error:
        # RecipeError, DataError and UnsupportedBackboneError are ValueErrors.
        raise SystemExit(f"prefix-adapter {command}: {error}" if _first() else 1) from error


if __name__ == "__main__":
    main()
