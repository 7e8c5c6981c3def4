"""Run all checks and measurements that need a GPU: correctness, time and memory, the training command.

    bash benchmarks/gpu.sh OUT
    python benchmarks/report.py OUT docs/performance.md benchmarks/performance_notes.md

This process starts workers. It does not import torch, so it survives any crash on the GPU. Sections that measure time
run alone; all others run in parallel in several workers. A worker appends a line to OUT/gpu.jsonl for each check. This
process reads these lines, ends a worker whose check takes too long, starts another worker for the remaining checks,
and keeps OUT/gpu.json up to date. OUT/performance.json has the figures in the format of performance.py, OUT/log.txt
everything that was printed, OUT/report.md the tables.

The exit status is 0 if every check passed or was skipped with a reason, 1 if a check failed, 3 if the time was up
first.
"""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from gpu import ROOT, Skip

# Sections, the most important first: name, function, its arguments, whether the section must run alone.
PLAN = [
    ["environment", "gpu.common:environment", {}, False],
    ["references fp32", "gpu.references:references", {"precision": "fp32"}, False],
    ["device fp32", "gpu.device:on_device", {"precision": "fp32"}, False],
    ["device bf16", "gpu.device:on_device", {"precision": "bf16"}, False],
    ["references bf16", "gpu.references:references", {"precision": "bf16"}, False],
    ["compiled bf16", "gpu.device:compiled", {"precision": "bf16"}, False],
    ["KLUE-NLI table fp32", "gpu.measures:klue_nli_table", {"precision": "fp32"}, True],
    ["decoder bf16", "gpu.measures:decoder", {"precision": "bf16"}, True],
    ["device fp16", "gpu.device:on_device", {"precision": "fp16"}, False],
    ["references fp16", "gpu.references:references", {"precision": "fp16"}, False],
    ["device tf32", "gpu.device:on_device", {"precision": "tf32"}, False],
    ["references tf32", "gpu.references:references", {"precision": "tf32"}, False],
    ["resumed", "gpu.training:resumed", {"precisions": ["fp32", "fp16", "bf16"]}, False],
    ["training command", "gpu.training:training_command", {}, False],
    ["compiled fp32", "gpu.device:compiled", {"precision": "fp32"}, False],
    ["KLUE-NLI table bf16", "gpu.measures:klue_nli_table", {"precision": "bf16"}, True],
    ["decoder fp32", "gpu.measures:decoder", {"precision": "fp32"}, True],
    ["decoder compiled bf16", "gpu.measures:decoder_compiled", {"precision": "bf16"}, True],
    ["KLUE-NLI table tf32", "gpu.measures:klue_nli_table", {"precision": "tf32"}, True],
]
CHECK_LIMIT, START_LIMIT, GRACE, SHARE = 75.0, 120.0, 10.0, 0.45
RECORDS, RESULT, LOG, PERFORMANCE, REPORT = "gpu.jsonl", "gpu.json", "log.txt", "performance.json", "report.md"


class TookTooLong(BaseException):
    """Raised when a check exceeds its time limit. Not an `Exception`, so that no check catches it by mistake."""


# ---- A worker


def append(out, record):
    """Append a line to the records in one write, so that lines of several processes do not mix."""
    line = json.dumps(record) + "\n"
    with open(out / RECORDS, "ab", buffering=0) as file:
        file.write(line.encode())


def read(out, start=0):
    """Return all complete records from byte `start` on, and the position after them."""
    path = out / RECORDS
    if not path.is_file():
        return [], start
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read()
    lines = lines[: lines.rfind(b"\n") + 1]
    return [json.loads(line) for line in lines.splitlines()], start + len(lines)


def work(args):
    """Run the checks of the sections `args.work` that have no record yet."""
    faulthandler.enable()  # a crash of the process leaves its traceback in the log
    records, _ = read(args.out)
    finished = {each["section"] for each in records if each.get("finished")}
    done = {(each["section"], each["check"]) for each in records if "status" in each}
    for name, function, arguments, _ in args.plan:
        if name not in args.work or name in finished:
            continue
        try:
            module, _, function = function.partition(":")
            planned = list(getattr(importlib.import_module(module), function)(args, **arguments))
        except Exception as error:
            planned = [("start", raising(error))]
        append(args.out, {"section": name, "planned": [check for check, _ in planned]})
        for check, call in planned:
            if (name, check) not in done and not run(args, name, check, call):
                sys.exit(1)  # the remaining checks run in a new process
        append(args.out, {"section": name, "finished": True})


def raising(error):
    """Return a check that raises `error`."""

    def call(figures):
        raise error

    return call


def run(args, section, check, call):
    """Run one check and record its result; return whether this process can continue."""
    figures = {}
    limit = getattr(call, "limit", args.check_limit)
    append(args.out, {"section": section, "check": check, "started": time.time(), "limit": limit})
    print(f"--- {section}: {check}", flush=True)
    started = time.perf_counter()
    record = {"section": section, "check": check, "status": "passed"}
    with Alarm(limit):
        try:
            call(figures)
        except Skip as reason:
            record |= {"status": "skipped", "reason": str(reason)}
        except (Exception, TookTooLong):
            record |= {"status": "failed", "error": traceback.format_exc(limit=-12)}
            print(record["error"], flush=True)
    record |= {"seconds": round(time.perf_counter() - started, 2), "figures": figures}
    append(args.out, record)
    return record["status"] != "failed" or usable()


class Alarm:
    """Context manager that raises `TookTooLong` in this thread after `seconds`."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_):
        raise TookTooLong(f"more than {self.seconds:.0f} s")


def usable():
    """Return whether this process can still use the GPU; after an illegal access it cannot."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


# ---- The process that supervises the workers


class Lane:
    """A worker, and the sections that it runs one after the other."""

    def __init__(self, run, names):
        self.run, self.names = run, names
        self.worker, self.started, self.seen, self.idle_starts = None, 0.0, 0, 0

    def left(self):
        """Return the sections that are not finished."""
        return [name for name in self.names if not self.run.sections[name]["finished"]]

    def current(self):
        """Return the section and the record of the running check, or `(None, None)`."""
        for name in self.left():
            if self.run.sections[name]["running"]:
                return name, self.run.sections[name]["running"]
        return None, None

    def tend(self):
        """Start, restart or end the worker; return whether any work is left."""
        if not self.left():
            self.stop()
            return False
        if self.worker is None:
            # A worker that repeatedly ends before it finishes a check would be restarted for ever.
            done = sum(len(self.run.sections[name]["checks"]) for name in self.names)
            self.idle_starts = self.idle_starts + 1 if done == self.seen else 0
            self.seen = done
            if self.idle_starts > 2:
                section = self.left()[0]
                self.run.fail(section, "start", "the worker ended again and again; see log.txt")
                append(self.run.out, {"section": section, "finished": True})
                self.idle_starts = 0
                return True
            self.worker = self.run.start(self.left())
            self.started = time.time()
            return True
        if self.worker.poll() is not None:
            self.run.update()  # the worker may have written records before it ended
            status, self.worker = self.worker.returncode, None
            section, check = self.current()
            if check is not None:
                self.run.fail(section, check["check"], f"the process ended with status {status}; see log.txt")
            return True
        section, check = self.current()
        since = check["started"] if check else max(self.started, *(self.run.last[name] for name in self.names))
        limit = check["limit"] + min(GRACE, check["limit"]) if check else START_LIMIT
        if time.time() - since > limit:
            self.stop()
            late = (section, check["check"]) if check else (self.left()[0], "start")
            self.run.fail(*late, f"killed after {limit:.0f} s")
        return True

    def stop(self):
        """End the worker and all processes that it started."""
        if self.worker is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGKILL)
            self.worker.wait()
            self.worker = None


class Run:
    """The state of all sections, and the files that record it."""

    def __init__(self, args):
        self.args, self.out, self.began = args, args.out, time.time()
        new = {"planned": None, "running": None, "cut_off": None, "finished": False}
        self.sections = {name: {**new, "checks": {}} for name, *_ in args.plan}
        self.last = dict.fromkeys(self.sections, 0.0)
        self.position, self.lanes, self.machine, self.ended = 0, [], {}, False
        self.packages = None
        self.log = open(self.out / LOG, "ab", buffering=0)  # noqa: SIM115

    def say(self, text):
        """Print a text and write it to the log."""
        print(text, flush=True)
        self.log.write((text + "\n").encode())

    def start(self, names):
        """Start a worker for these sections."""
        command = [sys.executable, "-u", "-m", "gpu.run", str(self.out), "--plan", json.dumps(self.args.plan)]
        command += ["--check-limit", str(self.args.check_limit), *(["--tiny"] if self.args.tiny else [])]
        command += ["--work", *names]
        paths = [ROOT / "benchmarks", ROOT / "tests", ROOT, self.packages, os.environ.get("PYTHONPATH")]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if self.args.tiny else {}),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        }
        streams = {"stdout": self.log, "stderr": self.log, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, **streams, env=environment, start_new_session=True)

    def fail(self, section, check, error):
        """Record a failure for a worker that has ended."""
        append(self.out, {"section": section, "check": check, "status": "failed", "error": error, "figures": {}})

    def update(self):
        """Read new records."""
        records, self.position = read(self.out, self.position)
        for each in records:
            section = self.sections[each["section"]]
            self.last[each["section"]] = time.time()
            if "planned" in each:
                section["planned"] = each["planned"]
            elif "started" in each:
                section["running"] = each
            elif "finished" in each:
                section["finished"], section["running"] = True, None
            else:
                section["running"] = None
                section["checks"][each["check"]] = each
                if each["section"] == "environment":
                    self.machine = each["figures"]
                note = each.get("reason") or each.get("error", "").strip().rpartition("\n")[2]
                self.say(f"{each['status']:8} {each['section']}: {each['check']} {note[:300]}".rstrip())
        if records:
            self.write()

    def drive(self, groups, until):
        """Run groups of sections in parallel until all are done or the time `until` is reached."""
        self.lanes = [Lane(self, names) for names in groups if names]
        try:
            while self.lanes and time.time() < until and not self.ended:
                self.update()
                self.lanes = [lane for lane in self.lanes if lane.tend()]
                time.sleep(0.1)
        finally:
            for lane in self.lanes:
                lane.stop()
        self.update()
        for section in self.sections.values():
            section["cut_off"], section["running"] = section["running"] or section["cut_off"], None

    def all(self):
        """Run everything within the budget."""
        deadline = self.began + self.args.budget
        together = [name for name, *_, alone in self.args.plan if not alone]
        alone = [name for name, *_, alone in self.args.plan if alone]
        if self.args.jobs == 1:
            self.drive([list(self.sections)], deadline)
            return
        groups = [together[start :: self.args.jobs] for start in range(self.args.jobs)]
        # The sections that measure time always get more than half of the budget; the others continue afterwards.
        self.drive(groups, self.began + SHARE * self.args.budget if alone else deadline)
        self.drive([alone], deadline)
        self.drive(groups, deadline)

    def status(self, section):
        """Return the status of a section in one word."""
        found = {each["status"] for each in section["checks"].values()}
        if "failed" in found:
            return "failed"
        if not section["finished"]:
            return "not finished" if section["checks"] or section["planned"] else "not run"
        return "passed" if "passed" in found else "skipped"

    def result(self):
        """Return the content of gpu.json."""
        sections = []
        for name, section in self.sections.items():
            checks = list(section["checks"].values())
            for check in section["planned"] or []:
                if check not in section["checks"]:
                    started = section["running"] or section["cut_off"]
                    begun = started is not None and started["check"] == check
                    checks.append({"check": check, "status": "not finished" if begun else "not run"})
            checks = [{key: value for key, value in each.items() if key != "section"} for each in checks]
            sections.append({"section": name, "status": self.status(section), "checks": checks})
        counts = Counter(check["status"] for each in sections for check in each["checks"])
        counts["sections not run"] = sum(each["status"] == "not run" for each in sections)
        settings = {"tiny": self.args.tiny, "budget": self.args.budget, "jobs": self.args.jobs}
        seconds = round(time.time() - self.began, 1)
        return {
            "machine": self.machine,
            "settings": settings,
            "seconds": seconds,
            "counts": dict(counts),
            "sections": sections,
        }

    def write(self):
        """Write gpu.json atomically and return its content."""
        result = self.result()
        unfinished = self.out / (RESULT + ".unfinished")
        unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
        unfinished.replace(self.out / RESULT)
        return result

    def end(self):
        """Write all files and return the exit status."""
        result = self.write()
        try:
            from report import gpu_figures

            (self.out / REPORT).write_text(gpu_figures(self.out), encoding="utf-8")
        except Exception:
            self.say("report.md could not be written:\n" + traceback.format_exc())
        for each in result["sections"]:
            counts = Counter(check["status"] for check in each["checks"])
            self.say(f"{each['status']:12} {each['section']:20} " + ", ".join(f"{n} {s}" for s, n in counts.items()))
        self.say(f"{result['seconds']} s; results in {self.out / RESULT}")
        statuses = {each["status"] for each in result["sections"]}
        return 1 if "failed" in statuses else 3 if statuses & {"not run", "not finished"} else 0


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to test the command itself")
    parser.add_argument("--budget", type=float, default=600, help="time limit for everything, in seconds")
    parser.add_argument("--check-limit", type=float, default=CHECK_LIMIT, help="time limit for a check, in seconds")
    parser.add_argument("--sections", nargs="+", help="run only these sections, by name or first word")
    parser.add_argument(
        "--jobs", type=int, help="parallel workers (default: one for each section, at most one per CPU)"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=os.environ.get("PREFIX_ADAPTER_WHEELS"),
        help="folder with wheels, or with unpacked packages, to import from (default: $PREFIX_ADAPTER_WHEELS)",
    )
    parser.add_argument("--plan", type=json.loads, default=PLAN, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.work:
        work(args)
        return
    if args.sections:
        wanted = [each for each in args.plan if {each[0], each[0].split()[0]} & set(args.sections)]
        unknown = [name for name in args.sections if not any(name in (e[0], e[0].split()[0]) for e in args.plan)]
        if unknown:
            parser.error(f"--sections: unknown {', '.join(unknown)}; choose from {', '.join(e[0] for e in args.plan)}")
        args.plan = wanted
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels: there is no folder {args.wheels}")
    args.jobs = args.jobs or min(os.cpu_count() or 1, sum(not alone for *_, alone in args.plan) or 1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (RECORDS, RESULT, LOG, PERFORMANCE, REPORT):
        (args.out / name).unlink(missing_ok=True)
    run = Run(args)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: setattr(run, "ended", True))
    with tempfile.TemporaryDirectory(prefix="prefix-adapter-wheels-") as site:
        if args.wheels:
            run.packages = unpacked(args.wheels, site)
        run.all()
    sys.exit(run.end())


def unpacked(wheels, site):
    """Return a folder to import from: `wheels` itself, or `site` after installing the wheels there."""
    files = sorted(wheels.glob("*.whl"))
    if files:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--no-cache-dir", "--target", site, *files], check=True)
    return site if files else str(wheels)


if __name__ == "__main__":
    main()
