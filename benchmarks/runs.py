"""Runs of a study: in parallel, each recorded as one line of JSON when it ends; finished runs are not repeated."""

import argparse
import itertools
import json
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path


def read(path):
    """Return the results of the finished runs, by the run's key."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {tuple(key): values for *key, values in lines}


def run_all(path, jobs, next_keys, job_of):
    """Do all runs that a file does not have yet. A run that fails does not stop the others.

    Args:
        path: The file of the results.
        jobs: The number of processes.
        next_keys: Returns, for the results so far, the keys of the runs that can start, the most important first.
        job_of: Returns, for a key, a function and its arguments; the function returns the results of the run.

    Raises:
        SystemExit: If a run failed.
    """
    known, running, failed = read(path), {}, {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while True:
            busy = {*running.values(), *failed, *known}
            waiting = (key for key in next_keys(known) if key not in busy)
            for key in itertools.islice(waiting, jobs - len(running)):
                running[pool.submit(*job_of(key))] = key
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if future.exception():
                    failed[key] = future.exception()
                    traceback.print_exception(failed[key])
                    continue
                known[key] = future.result()
                print(*key, known[key], flush=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([*key, known[key]]) + "\n")
    if failed:
        raise SystemExit("failed: " + "; ".join(f"{key}: {error}" for key, error in failed.items()))


def new_parser(doc, results):
    """Return a parser with the options that all studies have.

    Args:
        doc: The docstring of the script.
        results: The default file of the results.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--models", type=Path, help="folder with the models")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    return parser


def study_or_report(parser, study, report):
    """Add the option `--report`, parse the command line, and do one of both."""
    parser.add_argument("--report", action="store_true", help="print the tables of the finished runs")
    args = parser.parse_args()
    if args.report:
        report(args)
    elif args.data and args.models:
        study(args)
    else:
        parser.error("--data and --models are needed, or --report")
