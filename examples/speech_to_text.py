"""Adapt a speech model to noise with a prefix: Whisper, without a download.

    pip install prefix-adapter
    OMP_NUM_THREADS=1 python examples/speech_to_text.py

The script creates a tiny Whisper with random weights, and first trains the whole model to write down sequences of
tones: mel features in, one token for each tone out. This only shows the mechanics, in about a minute on one CPU
core. Then the model is frozen. The second recording has a loud hum, and the model mishears it. A prefix for the
encoder, the decoder and cross-attention is trained on recordings with the hum, saved and loaded. The model with the
prefix understands them, and without it still those without the hum.
"""

import argparse
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

TONES, LENGTH, FRAMES, BINS, HUM_BIN, HUM = 6, 4, 8, 16, 13, 8.0
END, START, FIRST = 1, 2, 3  # token ids; the pad token is 0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("runs/speech"), help="folder for the adapter")
parser.add_argument("--base-steps", type=int, default=300, help="steps in which the tiny model learns the tones")
parser.add_argument("--steps", type=int, default=300, help="steps in which the prefix learns to ignore the hum")
args = parser.parse_args()


def speak(count, seed, hum):
    """Mel features `[count, bins, frames]` of random sequences of tones, and the tokens of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    tones = torch.randint(TONES, (count, LENGTH), generator=generator)
    features = 0.1 * torch.randn(count, BINS, LENGTH * FRAMES, generator=generator)
    for position in range(LENGTH):
        features[torch.arange(count), 2 * tones[:, position], position * FRAMES : (position + 1) * FRAMES] += 1.0
    features[:, HUM_BIN] += hum
    return features, torch.cat([tones + FIRST, torch.full((count, 1), END)], dim=1)


def teach(model, steps, learning_rate, hum):
    """Train the parameters of a model that need gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model.train()
    for step in range(steps):
        features, labels = speak(32, 1000 + step, hum)
        loss = model(input_features=features, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"    step {step:4}  loss {loss.item():.3f}")
    model.eval()


def listen(model, hum):
    """The part of 100 sequences that the model writes down without an error."""
    features, labels = speak(100, 7, hum)
    written = model.generate(input_features=features, max_new_tokens=LENGTH + 1, do_sample=False)
    # Whisper's `generate` returns the tokens without the start, and pads them behind the end.
    written = torch.nn.functional.pad(written, (0, LENGTH + 1))[:, : LENGTH + 1]
    return (written == labels.where(labels != END, 0)).all(dim=1).float().mean().item()


torch.manual_seed(0)
size = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
tokens = {"pad_token_id": 0, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
config = WhisperConfig(
    vocab_size=FIRST + TONES, num_mel_bins=BINS, max_source_positions=LENGTH * FRAMES // 2, max_target_positions=16,
    suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0, **size, **heads, **tokens,
)  # fmt: skip
base = WhisperForConditionalGeneration(config)
print("The tiny model learns the tones:")
teach(base, args.base_steps, 2e-3, hum=0.0)
print(f"Without the hum: {listen(base, 0.0):.0%} right, with it: {listen(base, HUM):.0%} right")

# Wrapping runs the model once on dummy mel features, whose size is in the config.
model = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=8, prefix_dropout=0.0))
model.print_trainable_parameters()
print("A prefix learns to ignore the hum:")
teach(model, args.steps, 3e-2, hum=HUM)
model.save_pretrained(args.output)
print(f"With the hum and the prefix: {listen(model, HUM):.0%} right")
with model.disable_adapter():
    print(f"Without either: {listen(model, 0.0):.0%} right")

again = PeftModel.from_pretrained(model.unload(), args.output).eval()
print(f"With the hum and the saved prefix: {listen(again, HUM):.0%} right")
