"""Vision-language models with multi-axis rotary positions: the places of an image's patches stay those of the base."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from peft import get_peft_model

from prefix_adapter import PeftModel, PrefixTuningV2Config, example_inputs

TEXT = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}  # fmt: skip
SIGHT = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3, "initializer_range": 0.2,
}  # fmt: skip
WIDE = {**SIGHT, "out_hidden_size": 32, "intermediate_size": 48}
IMAGE, PATCHES, SIZE = 80, 16, torch.tensor([[1, 8, 8]])
TOKENS = {"image_token_id": IMAGE, "video_token_id": 81, "vision_start_token_id": 82, "vision_end_token_id": 83}
QWEN3 = {**WIDE, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
KINDS = {
    "Qwen2VL": (TEXT, {**SIGHT, "embed_dim": 32, "mlp_ratio": 2}, TOKENS),
    "Qwen2_5_VL": (TEXT, {**WIDE, "window_size": 16, "fullatt_block_indexes": [1]}, TOKENS),
    "Qwen3VL": (TEXT, QWEN3, TOKENS),
    "Glm4v": (
        {**TEXT, "rope_parameters": {**TEXT["rope_parameters"], "partial_rotary_factor": 1.0}},
        {**WIDE, "image_size": 32},
        {"image_token_id": IMAGE, "video_token_id": 81, "image_start_token_id": 82, "image_end_token_id": 83},
    ),
}
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [*range(80, 90)]}


def base_of(kind: str):
    text, sight, tokens = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(tr, f"{kind}Config")(text_config=text, vision_config=sight, **tokens)
    return getattr(tr, f"{kind}ForConditionalGeneration")(config).eval()


def wrap(base, **settings):
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "init_std": 1.0, "prefix_dropout": 0.0, **settings}
    return get_peft_model(base, PrefixTuningV2Config(**config)).eval()


@functools.cache
def shared_model(kind: str):
    """For tests that leave the model as they find it."""
    return wrap(base_of(kind))


# Two rows of different lengths, with an image in the middle of the text.
ROWS = [
    torch.tensor([*before, 82, *[IMAGE] * PATCHES, 83, *after])
    for before, after in (([5, 6], [7, 8, 9, 10]), ([], [11, 12]))
]
PIXELS = [torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def batch_of(*rows: int) -> dict:
    """The rows as a batch, padded on the left."""
    longest = max(len(ROWS[row]) for row in rows)
    ids = torch.stack([F.pad(ROWS[row], (longest - len(ROWS[row]), 0)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([PIXELS[row] for row in rows]),
        "image_grid_thw": SIZE.repeat(len(rows), 1),
    }


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


@pytest.fixture
def seen(request):
    """The positions that reach the rotary embedding of the text model."""
    found, rotary = [], shared_model(request.node.callspec.params["kind"]).base_model.model.model.language_model

    def note(module, args, kwargs):
        found.append(kwargs.get("position_ids", args[-1]).clone())

    handle = rotary.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_images_stay_where_the_base_model_places_them(kind, seen):
    model, inputs = shared_model(kind), batch_of(0)
    with model.disable_adapter():
        base = model(**inputs).logits
    ours = model(**inputs).logits
    without_mask = model(**{name: value for name, value in inputs.items() if name != "attention_mask"}).logits
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    # An image has fewer places than patches.
    assert seen[0].dim() == 3 and seen[0].max() < len(ROWS[0]) - 1
    assert torch.equal(ours, without_mask) and not torch.allclose(ours, base, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_padded_on_the_left_is_the_row_alone(kind):
    model, together = shared_model(kind), shared_model(kind)(**batch_of(0, 1)).logits
    for row, ids in enumerate(ROWS):
        close(together[row, -len(ids) :], model(**batch_of(row)).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_alone(kind):
    """The text model inside counts by itself here, padding too, which a prefix must not stand before."""
    model, texts = shared_model(kind), [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11, 12])]
    ids = torch.stack([F.pad(text, (5 - len(text), 0)) for text in texts])
    model.base_model.model.model.rope_deltas = None  # what a generation has left there
    together = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    for row, text in enumerate(texts):
        alone = model(input_ids=text[None]).logits
        close(together[row, -len(text) :], alone[0])
        assert torch.equal(model(input_ids=text[None], attention_mask=torch.ones_like(text)[None]).logits, alone)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_and_training_agree(kind):
    model = shared_model(kind)
    together = model.generate(**batch_of(0, 1), **GENERATE)[:, -5:]
    for row in (0, 1):
        inputs = batch_of(row)
        found = model.generate(**inputs, **GENERATE, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences[0, -5:], together[row])
        ids = found.sequences
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
        close(model(**inputs).logits[0, len(ROWS[row]) - 1 : -1], torch.cat(found.logits))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shifted_positions_in_a_mixed_batch(kind):
    model = wrap(base_of(kind), shift_positions=True)
    model.add_adapter("more", PrefixTuningV2Config(num_virtual_tokens=7, init_std=1.0, shift_positions=True))
    expected = [model(**batch_of(0)).logits[0]]
    with model.disable_adapter():
        expected.append(model(**batch_of(0)).logits[0])
    model.set_adapter("more")
    expected.append(model(**batch_of(0)).logits[0])
    mixed = model(**batch_of(0, 0, 0), adapter_names=["default", "__base__", "more"]).logits
    for one, other in zip(mixed, expected, strict=True):
        close(one, other)
    assert not torch.allclose(expected[0], expected[2], atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_entry_in_the_vision_tower(kind, tmp_path):
    """An image gets the features that it has alone, whatever other images are in the batch."""
    base, batch = base_of(kind), batch_of(0, 1)
    with pytest.warns(UserWarning, match="did not reach model.visual"):
        wrap(base_of(kind), entry_point="attention")
    with example_inputs(**batch):
        model = wrap(base, entry_point="attention")
    tower = model.get_base_model().model.visual
    names = {target.name for target in model.base_model.prefix_layer.targets}
    assert sum("visual" in name for name in names) == 2 and sum("language_model" in name for name in names) == 2

    def see(pixels, grid):
        return tower(pixels, grid_thw=grid).pooler_output

    with torch.no_grad():
        both = see(torch.cat(PIXELS), SIZE.repeat(2, 1))
        alone = torch.cat([see(pixels, SIZE) for pixels in PIXELS])
        torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            assert (see(PIXELS[0], SIZE) - alone[: len(alone) // 2]).abs().max() > 1e-2
        cached, without = (model.generate(**batch, **GENERATE, use_cache=use_cache) for use_cache in (True, False))
        assert torch.equal(cached, without)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="within the `example_inputs` with which it was made"):
        PeftModel.from_pretrained(base_of(kind), str(tmp_path))
