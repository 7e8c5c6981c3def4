"""Train a prefix and a head on a frozen ViT that classifies images, and use the saved adapter.

    pip install prefix-adapter
    OMP_NUM_THREADS=1 python examples/image_classification.py

This is the setting of VPT-deep (Jia et al. 2022, https://arxiv.org/abs/2203.12119): trained vectors in every layer of
a frozen vision transformer, and a linear head. Here the vectors are keys and values. ViT's attention takes no cache,
so the prefix enters through the attention function: `entry_point="attention"`.

The script needs no pretrained ViT and no files. An image has an upper and a lower half, each with noise around one
colour. Without --model a tiny ViT is created, and first trained as a whole to name the upper colour. This only shows
the mechanics, offline and in half a minute on one CPU core. Then the model is frozen, and learns to name the lower
colour: with a new head alone, for which the output does not tell enough, and with a head and a prefix.

--model is a pretrained ViT, DeiT, BEiT or DINOv2, by its name on the Hub or its folder. For images of your own,
replace `draw` by a function that reads them as the model's `AutoImageProcessor` does.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, ViTConfig, logging

from prefix_adapter import PeftModel, PrefixTuningV2Config, get_peft_model

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a pretrained vision transformer (default: a tiny one is created)")
parser.add_argument("--output", type=Path, default=Path("runs/colours"), help="folder for the base model and adapter")
parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
args = parser.parse_args()
logging.set_verbosity_error()  # no reports on the new head


def draw(count, size, seed):
    """Draw images `[count, 3, size, size]`; return them with the colours of their halves, `[count, 2]`."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randint(len(COLOURS), (count, 2), generator=random)
    halves = torch.tensor(list(COLOURS.values()))[colours].float()
    images = halves.permute(0, 2, 1).repeat_interleave(size // 2, 2).unsqueeze(3).expand(-1, -1, -1, size)
    return images + 0.5 * torch.randn(images.shape, generator=random), colours


def fit(model, half, rates):
    """Train all parameters that require a gradient, with a rate for the head and one for the others."""
    groups = {"head": [], "others": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["head" if "classifier" in name else "others"].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[name], "lr": rate} for name, rate in rates.items()])
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    model.train()
    for step in range(args.steps):
        images, colours = draw(32, model.config.image_size, seed=step)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, colours[:, half])
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def classify(model):
    """Return the colours that the model finds in other images, and the share of those that are the lower ones."""
    images, colours = draw(200, model.config.image_size, seed=1_000_000)
    found = model(pixel_values=images).logits.argmax(-1)
    return found, (found == colours[:, 1]).float().mean()


def make_model(folder):
    """Create and train a tiny ViT that names the upper colour."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=4, num_labels=len(COLOURS), **sizes)
    model = AutoModelForImageClassification.from_config(config)
    fit(model, 0, {"head": 1e-3, "others": 1e-3}).base_model.save_pretrained(folder)
    return folder


def load_base():
    """Load the model with a new head, the same at every call."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(COLOURS)), "label2id": {name: i for i, name in enumerate(COLOURS)}}
    return AutoModelForImageClassification.from_pretrained(base, **labels, ignore_mismatched_sizes=True)


base = args.model or make_model(args.output / "base")

model = load_base()
model.base_model.requires_grad_(False)
_, right = classify(fit(model, 1, {"head": 2e-2}))
print(f"the lower colour, by the head alone:      {right:.3f}")

config = PrefixTuningV2Config(
    entry_point="attention", num_virtual_tokens=8, init_std=0.5, modules_to_save=["classifier"]
)
model = get_peft_model(load_base(), config)
model.print_trainable_parameters()
found, right = classify(fit(model, 1, {"head": 2e-2, "others": 5e-2}))
print(f"the lower colour, by prefix and head:     {right:.3f}")
model.save_pretrained(args.output / "adapter")

loaded = PeftModel.from_pretrained(load_base(), args.output / "adapter").eval()
again, _ = classify(loaded)
print(f"the saved adapter gives the same answers: {torch.equal(found, again)}")
print("of the first images:", ", ".join(loaded.config.id2label[number] for number in again[:5].tolist()))
