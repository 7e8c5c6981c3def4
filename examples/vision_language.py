"""Train a prefix for a frozen vision-language model, and let the saved adapter describe images.

    pip install prefix-adapter
    OMP_NUM_THREADS=1 python examples/vision_language.py

A prompt has an image in the middle of its text: "see <image> :". The prefix stands in front of all of it, in the
language model, and enters through the cache as in any decoder. Positions, masks and the places of the image stay those
of the base model.

The script needs no pretrained model and no files. An image is an upper and a lower half, each of one colour. A tiny
LLaVA is created, and first trained as a whole to answer with both colours, the upper one first. This only shows the
mechanics, offline and in half a minute on one CPU core. Then the model is frozen, and a prefix is trained for the
other order. With the adapter the model names the lower colour first, without it still the upper one.

For a pretrained model load it with `AutoModelForImageTextToText.from_pretrained`, and make the batches with its
`AutoProcessor`, which inserts the image's tokens. The rest stays.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
WORDS = ["<pad>", "<s>", "</s>", "<image>", "see", ":", *COLOURS]
PAD, START, END, IMAGE = range(4)
SIZE, PATCH = 16, 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("runs/colours"), help="folder for the base model and adapter")
parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
args = parser.parse_args()


def make_batch(count, seed, upper_first):
    """Draw images; return the prompts, `[count, tokens]`, and their answers, `[count, 3]`."""
    draw = torch.Generator().manual_seed(seed)
    colours = torch.randint(len(COLOURS), (count, 2), generator=draw)
    halves = torch.tensor(list(COLOURS.values()))[colours].float()
    images = halves.permute(0, 2, 1).repeat_interleave(SIZE // 2, 2).unsqueeze(3).expand(-1, -1, -1, SIZE)
    prompt = [START, WORDS.index("see"), *[IMAGE] * (SIZE // PATCH) ** 2, WORDS.index(":")]
    named = (colours if upper_first else colours.flip(1)) + WORDS.index("red")
    answers = torch.cat([named, torch.full((count, 1), END)], dim=1)
    inputs = {
        "input_ids": torch.tensor([prompt]).repeat(count, 1),
        "attention_mask": torch.ones(count, len(prompt), dtype=torch.long),
        "pixel_values": images + 0.3 * torch.randn(images.shape, generator=draw),
    }
    return inputs, answers


def fit(model, upper_first, rate):
    """Train all parameters that require a gradient to continue each prompt with its answer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    model.train()
    for step in range(args.steps):
        inputs, answers = make_batch(16, step, upper_first)
        ids = torch.cat([inputs["input_ids"], answers], dim=1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answers], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    return model.eval()


def answer(model, inputs):
    """Return the two words that the model generates, `[count, 2]`."""
    found = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :]


def make_model(folder):
    """Create and train a tiny LLaVA that names the upper colour first."""
    layers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sight = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, projection_dim=64, **layers)
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    text = LlamaConfig(vocab_size=len(WORDS), **special, **layers)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=sight, text_config=text, image_token_id=IMAGE, **special)
    model = AutoModelForImageTextToText.from_config(config)
    fit(model, upper_first=True, rate=2e-3).save_pretrained(folder)
    return folder


base = make_model(args.output / "base")
model = AutoModelForImageTextToText.from_pretrained(base)
model = get_peft_model(model, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=8, init_std=0.1))
model.print_trainable_parameters()
fit(model, upper_first=False, rate=3e-2).save_pretrained(args.output / "adapter")

loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), args.output / "adapter").eval()
inputs, wanted = make_batch(100, seed=10_000, upper_first=False)
found = answer(loaded, inputs)
with loaded.disable_adapter():
    before = answer(loaded, inputs)
print(f"lower colour first, with the prefix: {(found == wanted[:, :2]).all(1).float().mean():.2f} of the images")
print(f"lower colour first, without it:      {(before == wanted[:, :2]).all(1).float().mean():.2f}")
print(f"the saved adapter gives the same answers: {torch.equal(found, answer(model, inputs))}")
for row in range(3):
    with_prefix, without = (" ".join(WORDS[token] for token in tokens[row]) for tokens in (found, before))
    print(f"    with the prefix {with_prefix:15}without it {without}")
