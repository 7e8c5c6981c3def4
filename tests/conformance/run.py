"""Run the conformance checks on every model type of the installed transformers.

python tests/conformance/run.py [--types bert llama ...] [--tasks CAUSAL_LM ...] [--jobs 2] [--json FILE]
    [--modality text|other|all]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


def _run_job(job: tuple) -> dict:
    return run_one(*job)


def run_one(model_type: str, task: str, names: list[str] | None = None, entry_point: str = "cache") -> dict:
    """Run the checks on one model type and task; return the status and the result of each check."""
    import checks
    import torch
    import transformers
    import zoo_modalities
    from zoo import NotBuilt

    from prefix_adapter import UnsupportedBackboneError

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    result: dict = {
        "type": model_type, "task": task, "modality": "text", "entry_point": entry_point, "checks": {},
    }  # fmt: skip
    case = checks.Case(model_type, task, config={"entry_point": entry_point})
    try:
        if not case.text:
            result["modality"] = zoo_modalities.modality_of(model_type, task)
        model = case.wrapped()
        layer = checks.layer_of(model)
        result["kinds"] = sorted({target.kind for target in layer.targets})
        result["without"] = layer.layers_without_prefix
    except NotBuilt as error:
        return {**result, "status": "not built", "why": str(error)}
    except UnsupportedBackboneError as error:
        return {**result, "status": "refused", "why": str(error)}
    except Exception as error:
        return {**result, "status": "failed", "why": f"wrapping: {type(error).__name__}: {error}"}
    for name in names or checks.CHECKS:
        try:
            checks.CHECKS[name](case)
            result["checks"][name] = "pass"
        except checks.Skip as error:
            result["checks"][name] = f"skip: {error}"
        except Exception as error:
            result["checks"][name] = f"FAIL {type(error).__name__}: {str(error)[:300]}"
    failed = any(said.startswith("FAIL") for said in result["checks"].values())
    return {**result, "status": "failed" if failed else "works", "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run the command."""
    import zoo
    import zoo_modalities

    from prefix_adapter.backbone.attention import ENTRY_POINTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--checks", nargs="*")
    parser.add_argument("--entry-points", nargs="*", choices=ENTRY_POINTS, default=list(ENTRY_POINTS))
    parser.add_argument("--modality", choices=("text", "other", "all"), default="text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first-task", action="store_true", help="only the first task of each type")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jobs, others = [], zoo_modalities.model_types()
    for known, types in ((zoo, zoo.text_model_types()), (zoo_modalities, zoo_modalities.model_types())):
        if args.modality not in ("all", "text" if known is zoo else "other"):
            continue
        for model_type in args.types or types:
            # At the attention function a text alone may not reach all that has a prefix.
            entry_points = [
                e for e in args.entry_points if known is not zoo or e == "cache" or model_type not in others
            ]
            tasks = [task for task in known.tasks_of(model_type) if not args.tasks or task in args.tasks]
            tasks = tasks[:1] if args.first_task else tasks
            jobs += [(model_type, task, args.checks, entry) for task in tasks for entry in entry_points]
    if unknown := sorted({*(args.types or ())} - {job[0] for job in jobs}):
        parser.error(f"nothing to run for {', '.join(unknown)}: another --modality or --tasks, or no model type")
    results = []
    # Processes are replaced after 50 jobs, because the models of 200 types do not free all their memory.
    with get_context("spawn").Pool(args.jobs, maxtasksperchild=50) as pool:
        for result in pool.imap_unordered(_run_job, jobs):
            results.append(result)
            if args.json:  # after each result, so that a run that is stopped has some
                args.json.write_text(json.dumps(sorted(results, key=lambda r: (r["type"], r["task"])), indent=1))
            said = [f"{name}: {text}" for name, text in result["checks"].items() if text.startswith("FAIL")]
            why = result.get("why", "")
            why = why if args.types else why[:300]
            name = f"{result['type']:28} {result['task']:14} {result['entry_point']:9}"
            line = f"{name} {result['status']:9} {why}"
            print("\n    ".join([line, *said]), flush=True)
    counts = {
        status: sum(r["status"] == status for r in results) for status in ("works", "refused", "not built", "failed")
    }
    print(f"{len(results)} model types and tasks:", ", ".join(f"{n} {status}" for status, n in counts.items()))


if __name__ == "__main__":
    main()
