"""`lora_r`: low-rank matrices beside the prefix, in the same adapter. PEFT's own LoRA is the reference."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from prefix_adapter import (
    AdapterPool,
    PrefixTuningV2Config,
    export_peft,
    fold,
    init_from,
    init_from_text,
    use_strength,
)
from prefix_adapter.training.model import trained_parameters

RANK, RATIO = 3, 16
MODELS = {
    "bert": ("AutoModel", ["query", "key", "value"]),
    "gpt2": ("AutoModelForCausalLM", ["attn.c_attn", "attn.c_proj"]),
    "llama": ("AutoModelForCausalLM", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "t5": ("AutoModel", ["q", "k", "v", "o"]),
    "bart": ("AutoModel", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "distilbert": ("AutoModel", ["q_lin", "k_lin", "v_lin", "out_lin"]),
}


def inputs_of(kind: str, batch: int = 2):
    inputs = {"input_ids": tiny.ids(batch)}
    return inputs | ({"decoder_input_ids": tiny.ids(batch, 5, seed=4)} if kind in ("t5", "bart") else {})


def new(kind: str, **settings):
    entry = "attention" if kind == "distilbert" else "cache"
    config = PrefixTuningV2Config(num_virtual_tokens=4, prefix_dropout=0.0, entry_point=entry, **settings)
    return get_peft_model(tiny.model(kind, MODELS[kind][0]), config)


def with_low_rank(kind: str, rank: int = RANK, seed: int = 2, **settings):
    model = new(kind, lora_r=rank, **settings)
    tiny.randomize(model, seed=seed)
    encoder = model.base_model.prefix_layer.encoder_of("default")
    with torch.no_grad():
        encoder.down.weight.mul_(RATIO / 2)
        encoder.up.weight.mul_(RATIO / 2)
    return model.eval()


def with_pefts_lora(model, kind: str):
    """The same prefix, beside a LoRA of PEFT with the same matrices."""
    reference = new(kind)
    ours, theirs = (each.base_model.prefix_layer for each in (model, reference))
    base, encoder = reference.base_model.model, ours.encoder_of("default")
    with torch.no_grad():
        theirs.encoder_of("default").embedding.weight.copy_(encoder.embedding.weight)
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODELS[kind][1]), base, adapter_name="lora"
    )
    modules, linears = dict(base.named_modules()), ours.adapters["default"].linears
    layers = [name for name, module in modules.items() if hasattr(module, "lora_A") and name]
    assert sorted(layers) == sorted(linears)
    for name, (inputs, outputs) in linears.items():
        modules[name].lora_A["lora"].weight.data = encoder.down.weight.detach()[:, inputs] / RATIO
        modules[name].lora_B["lora"].weight.data = encoder.up.weight.detach()[:, outputs].T / RATIO
    return reference.eval(), {name: modules[name] for name in linears}


def output_of(model, inputs, **kwargs):
    return model(**inputs, **kwargs)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_those_of_a_prefix_beside_pefts_lora(kind):
    model = with_low_rank(kind)
    reference, layers = with_pefts_lora(model, kind)
    inputs = inputs_of(kind)
    ours, theirs = output_of(model, inputs), output_of(reference, inputs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    without = new(kind)
    with torch.no_grad():
        encoder = without.base_model.prefix_layer.encoder_of("default")
        encoder.embedding.weight.copy_(model.base_model.prefix_layer.encoder_of("default").embedding.weight)
    assert (ours - output_of(without.eval(), inputs)).abs().max() > 0.1

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    layer = model.base_model.prefix_layer
    encoder = layer.encoder_of("default")
    for name, (columns_in, columns_out) in layer.adapters["default"].linears.items():
        for ours_, theirs_ in (
            (encoder.down.weight.grad[:, columns_in], layers[name].lora_A["lora"].weight.grad),
            (encoder.up.weight.grad[:, columns_out], layers[name].lora_B["lora"].weight.grad.T),
        ):
            scale = theirs_.abs().max()
            torch.testing.assert_close(ours_ * RATIO / scale, theirs_ / scale, atol=1e-4, rtol=1e-3)
    prefix = reference.base_model.prefix_layer.encoder_of("default").embedding.weight.grad
    torch.testing.assert_close(encoder.embedding.weight.grad, prefix, atol=1e-4 * prefix.abs().max(), rtol=1e-3)


def test_it_starts_as_the_prefix_alone_and_adam_moves_it_as_a_lora_of_a_sixteenth_of_the_rate():
    kind = "bert"
    model = new(kind, lora_r=RANK)
    reference, layers = with_pefts_lora(model, kind)
    assert torch.equal(output_of(model.eval(), inputs_of(kind)), output_of(reference, inputs_of(kind)))
    encoder = model.base_model.prefix_layer.encoder_of("default")
    columns, _ = next(iter(model.base_model.prefix_layer.adapters["default"].linears.values()))
    # PEFT's LoRA draws its first matrix from the same uniform distribution.
    start = encoder.down.weight[:, columns].detach() / RATIO
    assert start.abs().max() <= tiny.HIDDEN**-0.5 and start.std() == pytest.approx((3 * tiny.HIDDEN) ** -0.5, rel=0.2)
    own = torch.optim.Adam(trained_parameters(model).values(), lr=0.03, eps=0)
    matrices = [p for layer in layers.values() for p in (layer.lora_A["lora"].weight, layer.lora_B["lora"].weight)]
    prefix = reference.base_model.prefix_layer.encoder_of("default").embedding.weight
    for parameter in matrices:
        parameter.requires_grad_(True)
    theirs = torch.optim.Adam([{"params": [prefix], "lr": 0.03}, {"params": matrices, "lr": 0.03 / RATIO}], eps=0)
    weights = torch.randn(2, 7, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for each, optimizer in ((model, own), (reference, theirs)):
            (output_of(each, inputs_of(kind)) * weights).sum().backward()
            # The gradient of A is zero in the first step, and without `eps` Adam would divide by zero.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.masked_fill_(parameter.grad == 0, 1e-12)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(
        output_of(model, inputs_of(kind)), output_of(reference, inputs_of(kind)), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "distilbert"])
def test_rows_of_a_mixed_batch_have_their_own_matrices(kind):
    model = with_low_rank(kind)
    for seed, (name, rank) in enumerate((("b", 1), ("c", 0))):
        config = copy.copy(model.peft_config["default"])
        config.lora_r = rank
        model.add_adapter(name, config)
        encoder = model.base_model.prefix_layer.encoder_of(name)
        for module in filter(None, encoder):
            module.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    names = ["default", "b", "c", "__base__"]
    inputs = inputs_of(kind, batch=4)
    with torch.no_grad():
        mixed = output_of(model, inputs, adapter_names=names)
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = output_of(model, one)
            else:
                model.set_adapter(name)
                alone = output_of(model, one)
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-5, rtol=2e-4)
        model.base_model.set_adapter(["default", "b"])
        both = output_of(model, inputs)
    assert (both - mixed).abs().max() > 1e-2


def test_generation_with_beams_and_rows_of_their_own():
    model = with_low_rank("llama")
    prompts = tiny.ids(2, 5)
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    expected = model.generate(input_ids=prompts, **settings)
    slow = model.generate(input_ids=prompts, use_cache=False, **settings)
    assert torch.equal(expected, slow)
    with model.disable_adapter():
        base = model.generate(input_ids=prompts, **settings)
    assert not torch.equal(expected, base)
    mixed = model.generate(input_ids=prompts, adapter_names=["default", "__base__"], **settings)
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], base[1])


def test_strength_scales_the_matrices_too():
    kind = "bert"
    model, inputs = with_low_rank(kind), inputs_of(kind)
    reference, layers = with_pefts_lora(model, kind)
    with torch.no_grad():
        for strength in (0.25, 1.5):
            for layer in layers.values():
                layer.set_scale("lora", strength)
            with use_strength(model, strength), use_strength(reference, strength):
                torch.testing.assert_close(
                    output_of(model, inputs), output_of(reference, inputs), atol=2e-5, rtol=2e-4
                )
        with use_strength(model, 0.25):
            quarter = output_of(model, inputs)
        with use_strength(model, [0.25, 0.0]):
            rows = output_of(model, inputs)
        with model.disable_adapter():
            base = output_of(model, inputs)
        torch.testing.assert_close(rows[0], quarter[0], atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(rows[1], base[1], atol=2e-5, rtol=2e-4)
        with use_strength(model, 0.0):
            assert torch.equal(output_of(model, inputs), base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_has_the_same_gradients(reentrant):
    model = with_low_rank("llama").train()
    inputs, gradients = inputs_of("llama"), []
    weights = torch.randn(2, 7, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        (output_of(model, inputs) * weights).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in trained_parameters(model).values()])
        model.zero_grad()
    assert len(gradients[0]) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_saved_folded_and_loaded_with_the_prefix(tmp_path):
    model, inputs = with_low_rank("bert", prefix_projection=True, encoder_hidden_size=5), inputs_of("bert")
    expected = output_of(model, inputs)
    model.save_pretrained(tmp_path / "mlp")
    fold(tmp_path / "mlp", tmp_path / "table")
    for folder in ("mlp", "table"):
        loaded = PeftModel.from_pretrained(tiny.model("bert"), tmp_path / folder)
        torch.testing.assert_close(output_of(loaded, inputs), expected)
        assert loaded.peft_config["default"].lora_r == RANK
    model.base_model.fold_adapter()
    torch.testing.assert_close(output_of(model, inputs), expected)
    names = {
        name.rpartition("prefix_tuning_v2_")[2] for name in load_file(tmp_path / "table/adapter_model.safetensors")
    }
    assert names == {"embedding.weight", "down.weight", "up.weight"}

    started = with_low_rank("bert", seed=9)
    init_from(started, tmp_path / "mlp")
    torch.testing.assert_close(output_of(started, inputs), expected)
    with pytest.raises(ValueError, match="make it with `lora_r=3`"):
        init_from(new("bert"), tmp_path / "table")

    pool = AdapterPool(tiny.model("bert"))
    torch.testing.assert_close(pool([tmp_path / "mlp", None], **inputs)[0][0], expected[0], atol=2e-5, rtol=2e-4)


def test_a_decoder_starts_from_a_text_before_the_matrices_are_trained():
    model, text, ids = new("llama", lora_r=2).eval(), list(range(7, 11)), tiny.ids(2)
    init_from_text(model, text)
    with torch.no_grad():
        behind = output_of(model, {"input_ids": ids})
        with model.disable_adapter():
            whole = output_of(model, {"input_ids": torch.cat([torch.tensor([text, text]), ids], 1)})
    torch.testing.assert_close(behind, whole[:, 4:], atol=2e-5, rtol=2e-4)
    with pytest.raises(ValueError, match="trained low-rank matrices"):
        init_from_text(with_low_rank("llama"), text)


def test_a_file_without_the_matrices_is_refused(tmp_path):
    with_low_rank("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("up.weight"))]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks .*up\.weight"):
        PeftModel.from_pretrained(tiny.model("bert"), tmp_path)


def test_pefts_prefix_tuning_cannot_have_it(tmp_path):
    base = tiny.model("llama", "AutoModelForCausalLM")
    base.save_pretrained(tmp_path / "base")
    config = PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=4, lora_r=1, shift_positions=True)
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"`lora_r=1`.*low-rank matrices"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_an_invalid_rank_is_refused(value):
    with pytest.raises(ValueError, match="`lora_r` must be an integer of at least 0"):
        PrefixTuningV2Config(lora_r=value)


def test_selected_layers_alone_have_matrices():
    model = new("bert", lora_r=2, layers_to_transform=[1])
    assert {name.split(".")[2] for name in model.base_model.prefix_layer.adapters["default"].linears} == {"1"}


def test_the_model_is_free_of_hooks_afterwards():
    model, inputs = with_low_rank("bert"), inputs_of("bert")
    base = model.unload()
    assert torch.equal(output_of(base, inputs), output_of(tiny.model("bert"), inputs))
    assert not any(module._forward_hooks for module in base.modules())
