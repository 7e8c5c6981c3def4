"""Try the installed package in an environment of its own: import, wrap, train, save, load, command line.

`python -I tests/wheel/installed.py` does not see the source tree. Only the dependencies of the package are needed.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import prefix_adapter
from prefix_adapter import PeftModel, PrefixTuningV2Config, fold, get_peft_model
from prefix_adapter.version import __version__

place = Path(prefix_adapter.__file__)
assert "site-packages" in place.parts, place
assert importlib.metadata.version("prefix-adapter") == __version__ == prefix_adapter.__version__
assert (place.parent / "py.typed").is_file()
assert not [name for name in prefix_adapter.__all__ if not hasattr(prefix_adapter, name)]

config = transformers.BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2
)
torch.manual_seed(0)
base = transformers.BertForSequenceClassification(config)
state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
ids, labels = torch.randint(5, 50, (4, 7)), torch.tensor([0, 1, 0, 1])
settings = PrefixTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=3, prefix_projection=True)
model = get_peft_model(base, settings)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
model.eval()
before = model(input_ids=ids, labels=labels).loss
before.backward()
assert all(parameter.grad is not None for parameter in trained)
optimizer.step()
after = model(input_ids=ids, labels=labels)
assert after.loss < before, (after.loss, before)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/adapter")
    fold(f"{folder}/adapter", f"{folder}/folded")
    for saved in ("adapter", "folded"):
        fresh = transformers.BertForSequenceClassification(config)
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, f"{folder}/{saved}")
        assert torch.equal(loaded(input_ids=ids).logits, after.logits), saved
    command = [str(Path(sys.executable).parent / "prefix-adapter"), "info", f"{folder}/folded"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    assert "PREFIX_TUNING_V2" in shown and "3x128" in shown, shown

print(f"prefix-adapter {__version__} works: loss {before:.4f}, {after.loss:.4f} after one step")
