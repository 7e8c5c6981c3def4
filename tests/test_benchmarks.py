"""The arms of the benchmark do the same work: given one prefix, they compute one output."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import arms
import report

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


@pytest.mark.parametrize(("arm", "kind"), [("floor", "bert"), ("floor", "llama"), ("reference", "bert")])
def test_the_same_prefix_gives_the_same_output(arm, kind):
    ours, other = built("ours", kind), arms.build(arm, tiny.config(kind), N).eval()
    layer = ours.base_model.prefix_layer
    table = layer.encoder_of("default").embedding.weight.data
    copy_backbone(backbone_of(ours), other.model if arm == "reference" else other)
    if arm == "reference":
        other.embedding.weight.data.copy_(table)
        # Its input stands behind the prefix.
        layer.adapters["default"] = dataclasses.replace(layer.adapters["default"], shifts=True)
    else:
        attention = [module for module in other.modules() if hasattr(module, "prefix_keys")]
        for module, target in zip(attention, layer.targets, strict=True):
            slot = next(iter(target.slots.values()))
            columns = layer.adapters["default"].columns[slot]
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


def test_a_page_of_results(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the `train` extra")
    made = {"machine": "M", "precision": "fp32", "versions": {"torch": "1"}, "commit": "c"}
    about = {"section": "train", "shape": "s", "n": 20, "width": None, **made}
    results = [{**about, "arm": arm, "seconds": s, "spread": 0.02} for arm, s in (("floor", 2.0), ("ours", 2.5))]
    same = {"section": "memory", "shape": "s", "any_n": True, "n": 20, "width": None, "arm": "frozen", "peak": 2**20}
    own = [{**about, "section": "memory", "n": n, "arm": "ours", "peak": n * 2**20} for n in (3, 4)]
    grown = {**about, "section": "growth", "grows": "n", "batch": 1, "tokens": 8, "layers": 2}
    growth = [
        {**grown, "arm": arm, "n": n, "seconds": 1.0, "spread": 0.0} for arm in ("ours", "floor") for n in (1, 2)
    ]
    results = json.loads(json.dumps([*results, {**same, **made}, *own, *growth]))
    page = report.page(results)
    assert "| s | 20 | - | 2e+03 ± 10 | 1.250 |" in page
    assert "| s | 3 | - | 1 | 3.000 |" in page and "| s | 4 | - | 1 | 4.000 |" in page
    report.plot(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
