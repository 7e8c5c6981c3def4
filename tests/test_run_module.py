"""`prefix-adapter run`: another program, which does not import this package, works with adapters of the method."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.cli import main

PROGRAM = """
import sys
if __name__ == "__main__":
    print(sys.argv[0] == __file__, sys.argv[1:], sys.modules["__main__"].__dict__ is globals())
    if "fail" in sys.argv:
        raise ValueError("of the program")
    if "load" in sys.argv:
        from peft import AutoPeftModelForFeatureExtraction as AutoPeftModel
        print(type(AutoPeftModel.from_pretrained(sys.argv[-1]).base_model).__name__)
    sys.exit(3)
"""


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    (tmp_path / "some_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_arguments_and_exit_status_are_those_of_the_module(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "-m", "some_program", "--model", "x", "--debug", "-m", "--help"])
    assert stopped.value.code == 3
    assert capsys.readouterr().out == "True ['--model', 'x', '--debug', '-m', '--help'] True\n"


def test_an_error_of_the_module_keeps_its_traceback(program):
    with pytest.raises(ValueError, match="of the program"):
        main(["run", "-m", "some_program", "fail"])


@pytest.mark.parametrize("name", ["no_such_module", "no_such.module", "."])
def test_a_module_that_is_missing(name, program):
    with pytest.raises(SystemExit, match="prefix-adapter run: no module named"):
        main(["run", "-m", name])


def test_no_module(program, capsys):
    with pytest.raises(SystemExit, match="-m needs the name"):
        main(["run", "-m"])
    with pytest.raises(SystemExit):
        main(["run", "some_program"])
    assert "there must be a value for -m" in capsys.readouterr().err


def test_a_program_of_its_own_loads_an_adapter_with_peft(program):
    """In a new process: this one has registered the method already."""
    base = tiny.model("llama")
    base.save_pretrained(program / "base")
    model = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"))
    model.peft_config["default"].base_model_name_or_path = str(program / "base")
    model.save_pretrained(program / "adapter")
    command = [sys.executable, "-m", "prefix_adapter", "run", "-m", "some_program", "load", str(program / "adapter")]
    done = subprocess.run(command, cwd=program, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == "PrefixTuningV2Model"
