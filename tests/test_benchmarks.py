"""The arms of the benchmark do the same work: given one prefix, they compute one output."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import reference
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import arms
import report
from gpu import device, references
from gpu.run import PLAN

BENCHMARKS = Path(arms.__file__).parent
N, WIDTH = 5, 12


def built(arm, kind, width=None):
    model = arms.build(arm, tiny.config(kind), N, width).eval()
    tiny.randomize(model)
    return model


def backbone_of(model):
    return model.base_model.model if hasattr(model, "peft_config") else getattr(model, "model", model)


def copy_backbone(source, target):
    own = {name: p for name, p in source.state_dict().items() if "prefix" not in name}
    own = {name.replace("modules_to_save.default.", "").replace("original_module.", ""): p for name, p in own.items()}
    missing, unexpected = target.load_state_dict(own, strict=False)
    assert not unexpected and all("prefix" in name for name in missing)


@torch.no_grad()
def outputs(model, kind):
    ids = tiny.ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return [model(input_ids=ids, attention_mask=each).logits[:, :5] for each in (torch.ones_like(ids), mask)]


@pytest.mark.parametrize(
    ("arm", "kind"),
    [("floor", "bert"), ("floor", "llama"), ("floor_third", "bert"), ("floor_third", "llama"), ("reference", "bert")],
)
def test_the_same_prefix_gives_the_same_output(arm, kind):
    ours = built("third" if arm == "floor_third" else "ours", kind)
    other = arms.build(arm, tiny.config(kind), N).eval()
    layer = ours.base_model.prefix_layer
    table = layer.encoder_of("default").embedding.weight.data
    copy_backbone(backbone_of(ours), other.model if arm == "reference" else other)
    if arm == "reference":
        other.embedding.weight.data.copy_(table)
        # Its input stands behind the prefix.
        layer.adapters["default"] = dataclasses.replace(layer.adapters["default"], shifts=True)
    else:
        attention = [module for module in other.modules() if hasattr(module, "prefix_keys")]
        for module, (slot, columns) in zip(attention, layer.adapters["default"].columns.items(), strict=True):
            keys, values = slot.shape.split(table[None, :, columns])
            module.prefix_keys.data.copy_(keys)
            module.prefix_values.data.copy_(values)
    for one, right in zip(outputs(other, kind), outputs(ours, kind), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", [*arms.ARMS, "frozen"])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_what_an_arm_trains(arm, width):
    model = arms.build(arm, tiny.config("bert"), N, width)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    backbone = {name for name in trained if ".query.weight" in name and "lora" not in name}
    assert bool(backbone) == (arm == "full")
    if arm in ("ours", "reference", "peft"):
        assert any("embedding" in name for name in trained)


@pytest.mark.parametrize("prefixed", [1, 2, 3])
def test_below_the_first_prefixed_layer_nothing_is_kept_and_no_gradient_computed(prefixed):
    model = arms.build("ours", tiny.config("bert"), N, prefixed=prefixed).train()
    needs, kept, now = {}, dict.fromkeys(range(tiny.LAYERS), 0), []
    for index, layer in enumerate(backbone_of(model).bert.encoder.layer):
        layer.register_forward_pre_hook(lambda module, args, index=index: now.append(index))
        layer.register_forward_hook(
            lambda module, args, output, index=index: needs.update({index: output.requires_grad})
        )

    def keep(tensor):
        if now and len(needs) < tiny.LAYERS:
            kept[now[-1]] += tensor.numel()
        return tensor

    ids = tiny.ids(2, 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    first = tiny.LAYERS - prefixed
    assert needs == {index: index >= first for index in range(tiny.LAYERS)}
    assert all((kept[index] > 0) == (index >= first) for index in kept)


def test_a_page_of_results(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the `train` extra")
    made = {"machine": "M", "precision": "fp32", "versions": {"torch": "1"}, "commit": "c"}
    about = {"section": "train", "shape": "s", "batch": 2, "n": 20, "width": None, **made}
    # The second round was slow for all: its ratio counts, and not how it stands to the others.
    seconds = {"floor": [2.0, 8.0, 2.0], "ours": [2.2, 8.2, 2.1], "full": [4.0, 16.0, 5.0], "third": [2.0, 8.0, 2.6]}
    results = [{**about, "arm": arm, "seconds": s} for arm, s in seconds.items()]
    same = {"section": "memory", "shape": "s", "batch": 2, "any_n": True, "arm": "frozen", "peak": 2**20, **made}
    own = [{**about, "section": "memory", "n": n, "arm": "ours", "peak": n * 2**20} for n in (3, 4)]
    saved = {**own[0], "checkpointing": True, "peak": 2**20}
    grown = {**about, "section": "growth", "grows": "n", "tokens": 8, "depth": 2}
    growth = [{**grown, "arm": arm, "n": n, "seconds": [1.0, 1.0]} for arm in ("ours", "floor") for n in (1, 2)]
    peaks = [{**grown, "section": "growth of memory", "arm": "ours", "n": n, "peak": 2**20} for n in (1, 2)]
    steps = [{**about, "section": "operations", "what": "w", "arm": arm, "operations": 7} for arm in ("ours", "floor")]
    # What is measured once for a shape is that of a batch.
    larger = [{**same, "batch": 4, "peak": 2**21}, {**own[0], "batch": 4, "peak": 2**21}]
    seeds = {**about, "shape": "multilingual", "batch": 32}
    seeds = [{**seeds, "arm": arm, "seconds": 3 * [s]} for arm, s in {"full": 4.0, "ours": 3.0, "floor": 2.0}.items()]
    whole = {"section": "memory", "shape": "multilingual", "batch": 32, "checkpointing": False, **made}
    seeds += [{**whole, "arm": arm, "any_n": True, "peak": 2**20, "before": 3 * 2**20} for arm in ("full", "frozen")]
    seeds += [{**whole, "arm": "ours", "n": 20, "width": None, "peak": 2**20, "before": 2**20}]
    results = json.loads(json.dumps([*results, same, *own, saved, *growth, *peaks, *steps, *larger, *seeds]))
    page = report.page(results, "Some notes.")
    assert "Some notes." in page
    assert "| s | 2 | 20 | - | 2000 ms | 2.000 ± 0.250 | 1.050 ± 0.038 | 1.000 ± 0.150 |" in page
    assert "| s | 2 | 3 | - | 1 MiB | - | 3.000 |" in page and "| s | 2 | 4 | - | 1 MiB | - | 4.000 |" in page
    assert "| s | 4 | 3 | - | 2 MiB | - | 1.000 |" in page
    assert "| s | 2 | ours | 3, - | 0.333 |" in page
    assert "| 20 | - | 0.455 | 0.750 | 0.500 | 0.656 | 0.500 | - |" in page
    assert "| step over full fine-tuning's | KLUE-NLI's ratio | 0.750 | **no** |" in page
    assert "| memory over full fine-tuning's | KLUE-NLI's ratio | 0.500 | yes |" in page
    assert "| w | 20 | - | 7 | 7 |" in page
    assert "| step over the floor's, table, n 20 | 1.03 | 1.500 (multilingual) | **no** |" in page
    assert "| step of the last third over full fine-tuning's | 0.50 | 0.500 ± 0.010 | yes |" in page
    report.plot(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


# ---- The command for a GPU


def gpu_command(out, *arguments, plan=None, path=None):
    """`bash benchmarks/gpu.sh OUT ...`, with other sections in place of its own, from modules in the folder `path`."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(path) if path else ""
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(out), *arguments]
    command += [] if plan is None else ["--plan", json.dumps(plan)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def checks_of(out):
    """The status of each check and of each section, and the checks themselves, as gpu.json says it."""
    sections = json.loads((out / "gpu.json").read_text(encoding="utf-8"))["sections"]
    checks = {(each["section"], check["check"]): check for each in sections for check in each["checks"]}
    return {key: each["status"] for key, each in checks.items()}, {e["section"]: e["status"] for e in sections}, checks


def passed(process, out):
    """The checks of a command that did nothing but pass and skip, by section and name."""
    printed, _ = process.communicate(timeout=550)
    statuses, _, checks = checks_of(out)
    assert set(statuses.values()) <= {"passed", "skipped"}, printed
    assert process.returncode == 0
    assert all(each["reason"] for each in checks.values() if each["status"] == "skipped")
    # The same test has a larger error where the arithmetic is coarser, and there was something to compare.
    every = [f"references {precision}" for precision in ("fp32", "fp16", "bf16")]
    worst = [checks[section, "paper"]["figures"]["worst"] for section in every if (section, "paper") in checks]
    assert len(worst) >= 2 and worst[0] > 0 and worst == sorted(set(worst))
    return checks


@pytest.mark.slow
def test_gpu_command_tiny(tmp_path):
    """A quick part of it, on the CPU."""
    quick = ("environment", "references fp16", "references bf16", "decoder bf16")
    plan = [section for section in PLAN if section[0] in quick]
    checks = passed(gpu_command(tmp_path / "out", "--tiny", "--jobs", "1", plan=plan), tmp_path / "out")
    assert {section for section, _ in checks} == set(quick)
    assert "| references bf16 | 5 | 0 | 0 | 0 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_gpu_command_tiny_with_every_section(tmp_path):
    """All of it, on the CPU."""
    passed(gpu_command(tmp_path / "out", "--tiny"), tmp_path / "out")
    _, sections, _ = checks_of(tmp_path / "out")
    assert list(sections) == [name for name, *_ in PLAN]
    assert sections["training command"] in ("passed", "skipped")
    assert all(status == "passed" for name, status in sections.items() if name != "training command")
    found = json.loads((tmp_path / "out" / "performance.json").read_text())
    seeds = {(e["precision"], e["arm"]) for e in found if e["section"] == "train" and e["shape"] == "multilingual"}
    assert seeds == {(p, arm) for p in ("fp32", "bf16", "tf32") for arm in ("full", "lora", "peft", "ours", "floor")}
    assert {each["section"] for each in found} == {"train", "memory", "decode", "first token"}
    assert {each["cache"] for each in found if each["section"] == "decode"} == {"dynamic", "static", "compiled"}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| references fp32 | 33 | 0 | 0 | 0 |" in page and "### Compared with the KLUE-NLI table" not in page
    assert "| multilingual | 2 | 20 | - |" in page


SECTIONS = """
import os, signal, sys, time
from gpu import Skip

def raises(figures):
    figures["seen"] = 7
    raise ValueError("a wrong number")

def skips(figures):
    raise Skip("needs a thing")

def dies(figures):
    os.kill(os.getpid(), signal.SIGSEGV)

def sleeps(figures):
    time.sleep(60)

def hangs(figures):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as a call into a library does
    time.sleep(60)

def fine(figures):
    figures["pid"] = os.getpid()

def troubled(args, extra):
    sleeps.limit = hangs.limit = 0.5
    assert extra == 3
    yield from [("raises", raises), ("skips", skips), ("dies", dies), ("sleeps", sleeps), ("hangs", hangs)]
    yield "fine", fine

def broken(args):
    raise RuntimeError("no such device")

def good(args):
    yield "fine", fine

def alone(args):
    yield "fine", fine

def long(args):
    yield "fine", fine
    yield "sleeps", sleeps
    yield "later", fine
"""


@pytest.fixture
def sections(tmp_path):
    """A folder with sections that do nothing but go wrong."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "trouble.py").write_text(SECTIONS)
    return folder


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_gpu_command_records_a_failure_and_goes_on(sections, tmp_path, jobs):
    """Whatever a check does, those behind it run, in the same process or in another one."""
    plan = [["troubled", "trouble:troubled", {"extra": 3}, False], ["broken", "trouble:broken", {}, False]]
    plan += [["alone", "trouble:alone", {}, True], ["good", "trouble:good", {}, False]]
    process = gpu_command(tmp_path / "out", "--jobs", jobs, plan=plan, path=sections)
    printed, _ = process.communicate(timeout=120)
    statuses, known, checks = checks_of(tmp_path / "out")
    expected = {"raises": "failed", "skips": "skipped", "dies": "failed", "sleeps": "failed", "hangs": "failed"}
    expected |= {"fine": "passed"}
    assert {name: status for (section, name), status in statuses.items() if section == "troubled"} == expected, printed
    assert known == {"troubled": "failed", "broken": "failed", "alone": "passed", "good": "passed"}
    assert process.returncode == 1
    assert checks["troubled", "raises"]["error"].strip().endswith("ValueError: a wrong number")
    assert "in raises" in checks["troubled", "raises"]["error"] and checks["troubled", "raises"]["figures"] == {
        "seen": 7
    }
    assert checks["troubled", "skips"]["reason"] == "needs a thing"
    assert "ended with status -11" in checks["troubled", "dies"]["error"]
    assert "TookTooLong: more than 0 s" in checks["troubled", "sleeps"]["error"]
    assert "killed after 1 s" in checks["troubled", "hangs"]["error"]
    assert "RuntimeError: no such device" in checks["broken", "start"]["error"]
    assert (tmp_path / "out" / "log.txt").read_text().count("ValueError: a wrong number") >= 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| troubled | 1 | 4 | 1 | 0 | - |" in page and "- troubled: raises: ValueError: a wrong number" in page


@pytest.mark.parametrize("how", ["budget", "SIGTERM", "SIGKILL"])
def test_gpu_command_that_is_cut_off_leaves_what_it_had(sections, tmp_path, how):
    plan = [["long", "trouble:long", {}, False], ["good", "trouble:good", {}, False]]
    out = tmp_path / "out"
    process = gpu_command(out, "--jobs", "1", "--budget", "3" if how == "budget" else "60", plan=plan, path=sections)
    if how != "budget":
        while '"sleeps", "started"' not in (out / "gpu.jsonl").read_text() if (out / "gpu.jsonl").is_file() else True:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(getattr(signal, how))
    printed, _ = process.communicate(timeout=60)
    statuses, known, checks = checks_of(out)
    assert statuses["long", "fine"] == "passed" and statuses["long", "later"] == "not run", printed
    assert statuses["long", "sleeps"] == "not finished"
    assert known == {"long": "not finished", "good": "not run"}
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 3)
    if how == "SIGKILL":  # nobody is left to end the worker
        os.kill(checks["long", "fine"]["figures"]["pid"], signal.SIGKILL)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(checks["long", "fine"]["figures"]["pid"], 0)
        assert "The time was up before the end." in (out / "report.md").read_text()


@pytest.mark.parametrize("kind", ["wheels", "packages"])
def test_gpu_command_imports_what_is_brought(sections, tmp_path, kind):
    brought = tmp_path / "brought"
    brought.mkdir()
    if kind == "packages":
        (brought / "trouble.py").write_text(SECTIONS)
    else:
        about = "Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n"
        with zipfile.ZipFile(brought / "trouble-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("trouble.py", SECTIONS)
            wheel.writestr("trouble-1.0.dist-info/METADATA", about)
            wheel.writestr(
                "trouble-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr("trouble-1.0.dist-info/RECORD", "")
    plan = [["good", "trouble:good", {}, False]]
    process = gpu_command(tmp_path / "out", "--wheels", str(brought), plan=plan)
    printed, _ = process.communicate(timeout=120)
    assert checks_of(tmp_path / "out")[1] == {"good": "passed"} and process.returncode == 0, printed


def gpu_check(section, name, precision="fp32"):
    """A check of the command, to be run here."""
    args = types.SimpleNamespace(tiny=True)
    call = dict(section(args, precision))[name]
    return lambda: call({})


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("sdpa any, grouped", "fp32"),
        ("sdpa any, grouped", "bf16"),
        ("generate, dynamic cache", "fp32"),
        ("mixed batch, grouped", "fp32"),
    ],
)
def test_gpu_checks_see_a_prefix_that_is_off(name, precision, monkeypatch):
    """By a tenth in float32, where an error of 1e-6 is seen, and by three tenths in bfloat16."""
    check = gpu_check(device.on_device, name, precision)
    check()
    behind, factor = device.Subject.behind, 1.1 if precision == "fp32" else 1.3

    def off(self, model, table, *inputs):
        return behind(self, model, None if table is None else table * factor, *inputs)

    monkeypatch.setattr(device.Subject, "behind", off)
    with pytest.raises(AssertionError, match="an error of"):
        gpu_check(device.on_device, name, precision)()


def test_gpu_references_are_tests_that_can_run_there():
    """With no fixture but the one that is replaced, and with a setting to run."""
    for module, name, which in references.REFERENCES + references.REFERENCES_ONCE:
        function = getattr(references.loaded("cpu", module), name)
        chosen = [settings for _, settings in references.cases(function) if which is None or which(settings)]
        assert chosen, name
        assert {*inspect.signature(function).parameters} - {"monkeypatch"} == {*chosen[0]}, name


def test_gpu_checks_see_a_mask_that_is_off(monkeypatch):
    check = gpu_check(device.on_device, "CausalMask")
    check()

    def off_by_one(tokens, length, where):
        return torch.ones(tokens, length + tokens, dtype=torch.bool, device=where).tril(length - 1)[None, None]

    monkeypatch.setattr(device, "CausalMask", off_by_one)
    with pytest.raises(AssertionError, match="with a plain mask"):
        check()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gpu_references_see_a_backbone_that_is_off(precision, monkeypatch):
    check = gpu_check(references.references, "paper", precision)
    check()
    linear = reference._linear
    monkeypatch.setattr(reference, "_linear", lambda weights, name, x: linear(weights, name, x) * 1.2)
    with pytest.raises(AssertionError, match="an error of"):
        check()


def test_figures_of_a_gpu_go_between_the_comments():
    page = f"before\n{report.GPU_START}\n\nNone yet.\n\n{report.GPU_END}\nafter\n"
    filled = report.insert(page, "| some | figures |\n")
    assert filled == f"before\n{report.GPU_START}\n\n| some | figures |\n\n{report.GPU_END}\nafter\n"
    assert report.insert(filled, "other") == page.replace("None yet.", "other")
    with pytest.raises(ValueError, match="the page has no"):
        report.insert("a page without", "figures")
    for path in (BENCHMARKS / "performance_notes.md", BENCHMARKS.parent / "docs" / "performance.md"):
        assert "X" in report.insert(path.read_text(encoding="utf-8"), "X")
