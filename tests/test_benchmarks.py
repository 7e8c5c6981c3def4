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
    assert "| step over full fine-tuning's | the seed's ratio | 0.750 | **no** |" in page
    assert "| memory over full fine-tuning's | the seed's ratio | 0.500 | yes |" in page
    assert "| w | 20 | - | 7 | 7 |" in page
    assert "| step over the floor's, table, n 20 | 1.03 | 1.500 (multilingual) | **no** |" in page
    assert "| step of the last third over full fine-tuning's | 0.50 | 0.500 ± 0.010 | yes |" in page
    report.plot(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
