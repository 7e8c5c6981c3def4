"""Several threads use one model: each gets the same output as a single thread."""

import threading

import pytest
import tiny
import torch
from peft import get_peft_model
from test_interrupted import gpt_neo, interrupt
from test_mixed_batch import build

from prefix_adapter import PrefixTuningV2Config, use_strength

# Each adapter has its own head.
HEADED = {name: {"num_virtual_tokens": n, "modules_to_save": ["classifier"]} for name, n in {"a": 3, "b": 5}.items()}
PLAIN = {"a": {"num_virtual_tokens": 3}, "b": {"num_virtual_tokens": 5, "shift_positions": True}}
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def in_threads(tasks):
    """Run each task in its own thread, and return its results or errors."""
    found = [None] * len(tasks)

    def work(index, task):
        try:
            found[index] = task()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    errors = [each for each in found if isinstance(each, Exception)]
    if errors:
        raise errors[0]
    return found


class Meeting:
    """A hook at which the first `parties` threads wait for each other, so that all are inside a forward."""

    def __init__(self, module, parties: int):
        self.barrier, self.met = threading.Barrier(parties), set()
        self.handle = module.register_forward_hook(self)

    def __call__(self, *_):
        if threading.get_ident() not in self.met:
            self.met.add(threading.get_ident())
            self.barrier.wait(30)


def model_of(kind: str):
    if kind == "bert":
        return build("bert", HEADED, auto_class="AutoModelForSequenceClassification")
    if kind == "llama":
        return build("llama", PLAIN)
    model = get_peft_model(gpt_neo(), PrefixTuningV2Config(num_virtual_tokens=3), adapter_name="a")
    model.add_adapter("b", PrefixTuningV2Config(num_virtual_tokens=5))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "prefix_tuning_v2" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


NAMES = [["a", "b", "__base__"], ["b", "__base__", "a"], ["__base__"] * 3, ["b", "b", "b"], None]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt_neo"])
def test_adapter_names_are_those_of_the_calling_thread(kind):
    model, ids = model_of(kind), tiny.ids(3, 7)

    def task(names):
        with torch.no_grad():
            return model(input_ids=ids, adapter_names=names).logits

    expected = [task(names) for names in NAMES]
    assert len({answer.sum().item() for answer in expected}) == len(NAMES)
    base = model.base_model.model
    # All are inside a forward. In GPT-Neo's attention they take turns.
    meeting = Meeting(base.transformer.h[0].ln_1 if kind == "gpt_neo" else base.prefix_tuning_v2.targets[0].module, 5)
    found = in_threads([lambda names=names: task(names) for names in NAMES])
    meeting.handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_thread_may_be_interrupted():
    """The forward of the other thread goes on, also with GPT-Neo's mask, for which threads take turns."""
    model, ids = model_of("gpt_neo"), tiny.ids(3, 7)
    attention = model.base_model.prefix_layer.targets[1].module
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=NAMES[0]).logits
        handle = interrupt(attention.k_proj, False, KeyboardInterrupt)

        def ask():
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=ids)

        in_threads([ask])
        handle.remove()
        assert torch.equal(model(input_ids=ids, adapter_names=NAMES[0]).logits, expected)


SWITCHES = {
    "set_adapter": lambda model: model.set_adapter("b"),
    "another and back": lambda model: (model.set_adapter("b"), model.set_adapter("a")),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "add": lambda model: model.add_adapter("c", model.peft_config["b"]),
    "delete another": lambda model: model.delete_adapter("b"),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("names", [None, ["a", "__base__"]], ids=["active", "mixed"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_switch_while_another_thread_is_in_a_call(kind, names, switch):
    model, ids = model_of(kind), tiny.ids(2, 7)
    layer = model.base_model.prefix_layer.targets[1].module
    inside, go_on = threading.Event(), threading.Event()

    def ask(names=names):
        with torch.no_grad():
            if kind == "bert":
                return model(input_ids=ids, adapter_names=names).logits
            mask = torch.ones_like(ids)
            return model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **GENERATE)

    expected = ask()

    def wait(*_):
        inside.set()
        assert go_on.wait(30)

    def change():
        try:
            assert inside.wait(30)
            SWITCHES[switch](model)
        finally:
            go_on.set()

    handle = layer.register_forward_hook(wait)
    found, _ = in_threads([ask, change])
    handle.remove()
    assert torch.equal(found, expected)
    if switch in ("set_adapter", "disable") and names is None:
        assert not torch.equal(ask(), expected)


@pytest.mark.parametrize("delete", ["model", "layer", "unload"])
def test_an_adapter_in_use_is_not_deleted(delete):
    model, ids = model_of("llama"), tiny.ids(2, 7)
    expected = model(input_ids=ids).logits
    remove = {
        "model": lambda: model.delete_adapter("a"),
        "layer": lambda: model.base_model.prefix_layer.delete_adapter("a"),
        "unload": model.unload,
    }[delete]
    with model._enable_peft_forward_hooks(), pytest.raises(RuntimeError, match=r"Adapter 'a' is in use by a call"):
        remove()
    assert torch.equal(model(input_ids=ids).logits, expected) and list(model.peft_config) == ["a", "b"]
    remove()


def test_a_switch_inside_a_call_of_the_same_thread():
    """A logits processor may call the base model, or another adapter, during generation."""
    model, ids = model_of("llama"), tiny.ids(2, 7)
    base = model.base_model.model
    with torch.no_grad():
        expected = {"a": base(input_ids=ids).logits}
        with model.disable_adapter():
            expected["base"] = base(input_ids=ids).logits
        found = {}
        with model._enable_peft_forward_hooks():
            found["a"] = base(input_ids=ids).logits
            with model.disable_adapter():
                found["base"] = base(input_ids=ids).logits
                assert torch.equal(model(input_ids=ids).logits, expected["base"])
            model.set_adapter("b")
            assert not torch.equal(base(input_ids=ids).logits, expected["a"])
            model.set_adapter("a")
            assert torch.equal(model(input_ids=ids).logits, expected["a"])
    for name, answer in found.items():
        assert torch.equal(answer, expected[name])


def replicate(model: torch.nn.Module) -> torch.nn.Module:
    """A replica as `nn.DataParallel` makes one for a device. Its own function needs GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replica, name, None if tensor is None else tensor.clone())
    return replicas[model]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt_neo"])
def test_data_parallel(kind):
    """Replicas run in threads with the hooks of the original. They have copies of the base model's weights."""
    model, ids = model_of(kind), tiny.ids(4, 7)
    with torch.no_grad():
        expected = [model(input_ids=part).logits for part in ids.split(2)]
        mixed = [model(input_ids=part, adapter_names=["b", "__base__"]).logits for part in ids.split(2)]
    replicas = [replicate(model) for _ in range(2)]
    changed = [each for name, each in model.named_parameters() if "prefix_tuning" not in name]
    kept = [each.clone() for each in changed]

    def task(replica, part, **kwargs):
        with torch.no_grad():
            return replica(input_ids=part, **kwargs).logits

    try:
        with torch.no_grad():
            for each in changed:
                each.zero_()  # the original is not called
        for names, answers in ((None, expected), (["b", "__base__"], mixed)):
            tasks = [
                lambda replica=replica, part=part, names=names: task(replica, part, adapter_names=names)
                for replica, part in zip(replicas, ids.split(2), strict=True)
            ]
            for one, other in zip(in_threads(tasks), answers, strict=True):
                assert torch.equal(one, other)
    finally:
        with torch.no_grad():
            for each, value in zip(changed, kept, strict=True):
                each.copy_(value)
    with pytest.raises(ValueError, match=r"4 names for a batch of 2.*`nn.DataParallel` splits the batch but not the"):
        in_threads([lambda: task(replicas[0], ids[:2], adapter_names=["a", "b", "a", "b"])])
    with use_strength(model, 0.5), pytest.raises(RuntimeError, match=r"no effect on the threads of `nn.DataParallel`"):
        in_threads([lambda: task(replicas[0], ids[:2])])
