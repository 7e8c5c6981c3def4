"""The probe's inputs: by modality, from the sizes in a config, or from the user's example."""

import threading

import pytest
import torch
import transformers as tr
from torch import nn

from prefix_adapter import PeftModel, PrefixTuningV2Config, UnsupportedBackboneError, example_inputs, get_peft_model
from prefix_adapter.backbone.dummy_inputs import get_inputs
from prefix_adapter.backbone.probe import probe, untouched

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WHISPER = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "init_std": 0.3,
}  # fmt: skip
VIT = tr.ViTConfig(**SMALL, image_size=24, patch_size=8)
CLIP = tr.CLIPVisionConfig(**SMALL, image_size=20, patch_size=4)
WAVES = tr.Wav2Vec2Config(
    **SMALL, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
SPECTROGRAM = tr.ASTConfig(**SMALL, num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8)
SERIES = tr.PatchTSTConfig(
    d_model=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, context_length=24, patch_length=4,
    patch_stride=4, num_input_channels=3,
)  # fmt: skip
SPEECH = tr.Speech2TextConfig(
    vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, conv_channels=16, input_feat_per_channel=12,
)  # fmt: skip


def whisper(seed=0):
    torch.manual_seed(seed)
    return tr.WhisperForConditionalGeneration(tr.WhisperConfig(**WHISPER)).eval()


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (VIT, "pixel_values", (1, 3, 24, 24)),
        (CLIP, "pixel_values", (1, 3, 20, 20)),
        (SPECTROGRAM, "input_values", (1, 32, 16)),
        (SERIES, "past_values", (1, 24, 3)),
        (tr.WhisperConfig(**WHISPER), "input_features", (1, 8, 40)),
    ],
    ids=["vit", "clip", "ast", "patchtst", "whisper"],
)
def test_sizes_come_from_the_config(config, name, shape):
    """The size is the one that the model demands: it fails with others."""
    model, seen = tr.AutoModel.from_config(config).eval(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs[name].shape), with_kwargs=True)
    with untouched(model):
        probe(model)
    assert seen[-1] == shape


@pytest.mark.parametrize("config", [WAVES, SPEECH], ids=["wav2vec2", "speech2text"])
def test_inputs_of_any_length(config):
    model = tr.AutoModel.from_config(config).eval()
    with untouched(model):
        output = probe(model)
    assert output[0].shape[1] >= 4


def test_text_comes_first_and_alone():
    """A model that reads text and images is probed on a text, and its vision tower does not run."""
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    text = {**SMALL, "vocab_size": 60, "num_key_value_heads": 2}
    config = tr.LlavaConfig(text_config={"model_type": "llama", **text}, vision_config=vision, image_token_id=50)
    model, ran = tr.LlavaForConditionalGeneration(config).eval(), []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(True))
    get_peft_model(model, PrefixTuningV2Config())
    assert not ran


def test_nothing_is_kept_for_a_backward_pass():
    model = tr.AutoModel.from_config(VIT)
    with untouched(model):
        output = probe(model)[0]
    assert output.requires_grad
    with pytest.raises((RuntimeError, AttributeError, TypeError)):
        output.sum().backward()


class NeedsDepth(tr.ViTPreTrainedModel):
    """A model with an input that nobody has heard of, of a size that no config names."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = tr.BertModel(tr.BertConfig(**SMALL, vocab_size=60, is_decoder=True))
        self.reduce = nn.Linear(5, 32)

    def forward(self, depth_map, use_cache=None):
        return self.decoder(inputs_embeds=self.reduce(depth_map), use_cache=use_cache)


def test_an_unknown_input_is_named_and_an_example_helps(tmp_path):
    def base():
        torch.manual_seed(0)
        return NeedsDepth(VIT).eval()

    with pytest.raises(UnsupportedBackboneError, match=r"requires `depth_map`.*example_inputs\(\*\*batch\)"):
        get_peft_model(base(), PrefixTuningV2Config())
    example = {"depth_map": torch.randn(3, 9, 5)}
    with example_inputs(**example):
        model = get_peft_model(base(), PrefixTuningV2Config(num_virtual_tokens=4, init_std=1.0)).eval()
    with torch.no_grad():
        ours = model(**example)[0]
        with model.disable_adapter():
            assert not torch.allclose(model(**example)[0], ours, atol=1e-2)
    model.save_pretrained(tmp_path)
    with example_inputs(**example):
        again = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**example)[0], ours)


def test_a_wrong_example_is_an_error_with_its_inputs():
    with (
        example_inputs(input_features=torch.randn(1, 8, 13), decoder_input_ids=torch.ones(1, 2, dtype=torch.long)),
        pytest.raises(UnsupportedBackboneError, match=r"example inputs \(input_features \[1, 8, 13\].*length 40"),
    ):
        get_peft_model(whisper(), PrefixTuningV2Config())
    with pytest.raises(ValueError, match="needs the arguments"), example_inputs():
        pass


def test_an_example_gives_the_same_targets_as_dummy_inputs():
    """Batches of a real size, with tokens that follow each other, are not taken for positions."""
    example = {"input_features": torch.randn(3, 8, 40), "labels": torch.arange(5, 11).repeat(3, 1)}
    with example_inputs(**example):
        ours = get_peft_model(whisper(), PrefixTuningV2Config()).base_model.model.prefix_tuning_v2
    dummy = get_peft_model(whisper(), PrefixTuningV2Config()).base_model.model.prefix_tuning_v2
    assert [t.name for t in ours.targets] == [t.name for t in dummy.targets]
    assert [list(t.slots) for t in ours.targets] == [list(t.slots) for t in dummy.targets]
    assert [p.name for p in ours.positions] == [p.name for p in dummy.positions]


def test_each_thread_has_its_own_example():
    model, found = whisper(), []

    def look():
        found.append(next(iter(get_inputs(model))).is_example)

    with example_inputs(input_features=torch.randn(1, 8, 40)):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    look()
    assert found == [False, True, False]


def test_peft_passes_inputs_that_whisper_does_not_know():
    """PEFT's class for encoder-decoders passes `input_ids=None`, which Whisper would pass on to its decoder."""
    config = PrefixTuningV2Config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    model = get_peft_model(whisper(), config).eval()
    features, labels = torch.randn(2, 8, 40), torch.randint(5, 60, (2, 6))
    with torch.no_grad():
        ours = model(input_features=features, labels=labels).logits
        assert torch.equal(model.get_base_model()(input_features=features, labels=labels).logits, ours)


def test_adapter_names_are_counted_by_images_and_sounds():
    model = get_peft_model(whisper(), PrefixTuningV2Config()).eval()
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="3 names for a batch of 2"):
        model(**inputs, adapter_names=["default"] * 3)
    beams = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    mixed = model.generate(**inputs, **beams, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        base = model.generate(input_features=inputs["input_features"][1:],
                              decoder_input_ids=inputs["decoder_input_ids"][1:], **beams)  # fmt: skip
    length = min(mixed.shape[1], base.shape[1])
    assert torch.equal(mixed[1, :length], base[0, :length])
