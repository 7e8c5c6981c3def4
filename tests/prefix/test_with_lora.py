"""A prefix and a LoRA on one base model with a task head: the trained head is used, in either order."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper

from prefix_adapter import PrefixTuningV2Config

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`"
)
IDS, LABELS = tiny.ids(6), torch.arange(6) % 3
ORDERS = ["lora first", "prefix first"]


def base():
    return tiny.model("bert", "AutoModelForSequenceClassification")


def lora(task=None):
    return LoraConfig(r=2, target_modules=["query", "value"], task_type=task)


def prefix(task=None):
    return PrefixTuningV2Config(num_virtual_tokens=4, prefix_dropout=0.0, init_std=0.5, task_type=task)


def combine(order: str, headed: str, names: tuple[str, str]):
    """Both on one base model; one has the head. Returns the model with the names of the LoRA and the prefix."""
    pair = [(lora("SEQ_CLS" if headed == "lora" else None), names[0])]
    pair.append((prefix("SEQ_CLS" if headed == "prefix" else None), names[1]))
    (one, first), (other, second) = pair if order == "lora first" else pair[::-1]
    return get_peft_model(get_peft_model(base(), one, first), other, second)


def head_of(model) -> ModulesToSaveWrapper:
    return next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))


def train(model) -> float:
    """Train, and return the remaining share of the loss. Each parameter that PEFT calls trained must change."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not any(torch.equal(*pair) for pair in zip(trained, before, strict=True))
    model.eval()
    return losses[-1] / losses[0]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("headed", ["lora", "prefix"])
@pytest.mark.parametrize("order", ORDERS)
def test_train_save_and_load(order, headed, tmp_path):
    names = ("l", "p")
    model = combine(order, headed, names)
    owner = names[headed == "prefix"]
    assert head_of(model).active_adapters == [owner]
    assert train(model) < 0.6
    assert head_of(model).active_adapters == [owner]
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-2)
    assert torch.equal(logits(model), expected)

    with pytest.raises(ValueError, match="is no adapter of this PEFT model, but of one inside or around it"):
        model.save_pretrained(tmp_path)
    loaded = combine(order, headed, names)
    assert not torch.allclose(logits(loaded.eval()), expected, atol=1e-2)
    inside, around = names if order == "lora first" else names[::-1]
    for own, new, name in ((model, loaded, around), (model.get_base_model(), loaded.get_base_model(), inside)):
        own.save_pretrained(tmp_path, selected_adapters=[name])
        new.load_adapter(tmp_path / name, name)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_each_saved_alone_and_loaded_one_after_the_other(order, tmp_path):
    """Each adapter is saved from its own model, and both are loaded onto a fresh base model."""
    model = combine(order, "prefix", ("l", "p"))
    assert train(model) < 0.6
    expected = logits(model)
    inner = model.base_model.model
    inner.save_pretrained(tmp_path / "inner", selected_adapters=["l" if order == "lora first" else "p"])
    model.save_pretrained(tmp_path / "outer", selected_adapters=["p" if order == "lora first" else "l"])
    names = ("l", "p") if order == "lora first" else ("p", "l")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "inner" / names[0], names[0])
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "outer" / names[1], names[1])
    assert torch.equal(logits(loaded), expected)


def test_the_same_name(tmp_path):
    """`get_peft_model` twice, without names: each model has its own configuration, and saves its own adapter."""
    model = combine("lora first", "prefix", ("default", "default"))
    assert head_of(model).active_adapters == ["default"] and train(model) < 0.6
    expected, inner = logits(model), model.base_model.model
    assert isinstance(model.peft_config["default"], PrefixTuningV2Config)
    assert isinstance(inner.peft_config["default"], LoraConfig)
    inner.save_pretrained(tmp_path / "lora")
    model.save_pretrained(tmp_path / "prefix")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "prefix")
    assert torch.equal(logits(loaded), expected)


def test_adapter_name_of_another_method_is_refused():
    message = "has an adapter 'default' of another PEFT method already, and its configuration would be lost"
    # The error comes at the first forward, because PEFT does not call the tuner when it adds a LoRA.
    with pytest.raises(ValueError, match=message):
        logits(combine("prefix first", "prefix", ("default", "default")))
    with pytest.raises(ValueError, match=message):
        logits(get_peft_model(inject_adapter_in_model(prefix(), base()), lora()))
    model = inject_adapter_in_model(lora(), base())
    expected, before = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, prefix())
    assert torch.equal(logits(model), expected) and [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("order", ORDERS)
def test_two_heads_are_refused(order):
    """Only one head could be used, and the order of loading would decide which one."""
    pair = [(lora("SEQ_CLS"), "l"), (prefix("SEQ_CLS"), "p")]
    (one, first), (other, second) = pair if order == "lora first" else pair[::-1]
    model = get_peft_model(base(), one, first)
    expected = logits(model)
    with pytest.raises(ValueError, match=rf"Adapter '{second}' brings a head \(Linear\) that adapter '{first}'"):
        get_peft_model(model, other, second)
    assert torch.equal(logits(model), expected) or order == "prefix first"


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_batch_with_a_head_of_the_lora(order):
    """All rows have the LoRA, so rows without a prefix have its head too."""
    model = combine(order, "lora", ("l", "p"))
    train(model)
    expected = logits(model)
    own = model if order == "lora first" else model.base_model.model
    layer = own.base_model.prefix_layer
    layer.enable_adapters(False)
    without = logits(model)
    layer.enable_adapters(True)
    with torch.no_grad():
        mixed = own(input_ids=IDS, adapter_names=["p", "__base__"] * 3).logits
    torch.testing.assert_close(mixed[::2], expected[::2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1::2], without[1::2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, without, atol=1e-2)
