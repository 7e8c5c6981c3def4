"""All or nothing: what fails in the middle of adding or loading an adapter leaves the model as it was."""

import sys

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from prefix_adapter import PrefixTuningV2Config, undo

IDS = tiny.ids()


def base():
    return tiny.model("bert", "AutoModelForTokenClassification")


def config(**changes):
    return PrefixTuningV2Config(
        task_type="TOKEN_CLS", num_virtual_tokens=4, init_std=1.0, prefix_dropout=0.0, **changes
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(base(), config())
    tiny.randomize(model)
    model.save_pretrained(folder)
    return folder


def picture(model) -> dict:
    """All that an adapter might leave behind in a model."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    return {
        "logits": logits,
        "names": [name for name, _ in model.named_modules()],
        "kinds": [type(module) for module in model.modules()],
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "adapters": sorted(getattr(model, "peft_config", None) or {}),
        "active": getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None,
        "values": [parameter.detach().clone() for parameter in model.parameters()],
    }


def check_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        if name == "values":
            assert all(torch.equal(*pair) for pair in zip(found[name], value, strict=True)), name
        elif name == "logits":
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value, name


def two(folder):
    model = get_peft_model(base(), config())
    tiny.randomize(model, seed=5)
    return model


# The model that each way changes, and how it does that.
WAYS = {
    "get_peft_model": (lambda folder: base(), lambda model, folder: get_peft_model(model, config())),
    "inject": (lambda folder: base(), lambda model, folder: inject_adapter_in_model(config(), model)),
    "from_pretrained": (lambda folder: base(), lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "add_adapter": (two, lambda model, folder: model.add_adapter("b", config())),
    "load_adapter": (two, lambda model, folder: model.load_adapter(folder, "b")),
    "load_adapter, trainable": (two, lambda model, folder: model.load_adapter(folder, "b", is_trainable=True)),
    "load_adapter, low memory": (two, lambda model, folder: model.load_adapter(folder, "b", low_cpu_mem_usage=True)),
    "load_adapter once more": (two, lambda model, folder: model.load_adapter(folder, "default")),
}


class Interrupter:
    """Raises at the n-th call of a function of PEFT, this package or `load_state_dict`; counts them if n is 0."""

    FILES = ("/peft/", "/prefix_adapter/")

    def __init__(self, at: int = 0, error: type[BaseException] = KeyboardInterrupt):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, frame, event, arg):
        # The undoing itself is not interrupted, nor what Python closes by itself, where errors are only printed.
        if event != "call" or frame.f_code.co_filename == undo.__file__ or frame.f_code.co_name == "<genexpr>":
            return
        if any(part in frame.f_code.co_filename for part in self.FILES) or frame.f_code.co_name == "load":
            self.calls += 1
            if self.calls == self.at:
                sys.setprofile(None)
                raise self.error

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_anywhere(way, saved):
    """At some 30 places, evenly spread over all functions that PEFT and this package call."""
    make, change = WAYS[way]
    model = make(str(saved))
    with Interrupter() as counter:
        change(model, str(saved))
    model = make(str(saved))
    expected = picture(model)
    for at in range(1, counter.calls, max(1, counter.calls // 30)):
        error = SystemExit if at % 2 else KeyboardInterrupt
        with pytest.raises(error), Interrupter(at, error):
            change(model, str(saved))
        check_same(picture(model), expected)
    # And it works when it is not interrupted.
    change(model, str(saved))
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()
    if "load" in way and way != "load_adapter once more":
        model.set_adapter("b")
    if "load" in way or way == "from_pretrained":
        loaded = PeftModel.from_pretrained(base(), saved)
        if way != "from_pretrained":
            assert torch.equal(model.eval()(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_a_file_that_changes_after_it_was_looked_at(way, saved, tmp_path, monkeypatch):
    """The weights are read twice: to be checked before anything changes, and to be loaded."""
    weights = load_file(saved / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    save_file(weights, tmp_path / "adapter_model.safetensors")
    make, change = WAYS[way]
    model = make(str(saved))
    expected = picture(model)
    key = next(name for name in weights if "prefix_tuning" in name)
    changed = {**weights, key: weights[key][:2].clone()}
    monkeypatch.setattr("peft.peft_model.load_peft_weights", lambda *_, **__: changed)
    with pytest.raises(ValueError, match="prefix_tuning_v2"):
        change(model, str(tmp_path))
    check_same(picture(model), expected)


@pytest.mark.filterwarnings("ignore")
def test_other_methods_of_peft_are_left_alone():
    """A LoRA that cannot be loaded leaves what PEFT leaves."""
    model = get_peft_model(base(), LoraConfig(task_type="TOKEN_CLS"))
    with pytest.raises(ValueError, match="No modules were targeted"):
        model.add_adapter("b", LoraConfig(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", LoraConfig())
    model.set_adapter("b")
    assert model(input_ids=IDS).logits.isfinite().all()
