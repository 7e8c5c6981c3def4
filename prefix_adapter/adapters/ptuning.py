"""Import of checkpoints of THUDM/P-tuning, the reference implementation of P-Tuning v1.

Its two parts, for LAMA and for SuperGLUE (`PT-Fewshot`), save the prompt encoder under different names. The modules
are those of our `PromptEncoder`. The language model is saved beside it, or is the frozen original.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..files.check import find_misfits
from ..files.contents import SAVED_ROOT, shapes_of
from ..files.pickled import read_state_dicts
from ..files.whole import check_free, new_folder
from ..messages import shorten
from ..ptuning.config import EncoderType, PTuningConfig
from ..ptuning.encoder import PromptSizes
from ..ptuning.names import LAYER_NAME, PREFIX
from .base_model import with_root
from .saved import AnyPath

# What a LAMA checkpoint has beside its tensors: the options of the run, the time, and the device among the options.
_IGNORED = (argparse.Namespace, datetime.datetime, torch.device)
# The parts of an encoder: their names there (SuperGLUE, then LAMA), and in our `PromptEncoder`.
_NAMES = {
    "prompt_embeddings.": "embedding.",
    "embedding.embedding.": "embedding.",
    "lstm_head.": "lstm.",
    "embedding.lstm_head.": "lstm.",
    "mlp_head.0.": "hidden.",
    "embedding.mlp_head.0.": "hidden.",
    "mlp.0.": "hidden.",
    "mlp_head.2.": "output.",
    "embedding.mlp_head.2.": "output.",
    "mlp.2.": "output.",
}

# The way out for files with other names.
_LAYOUTS = (
    "A LAMA run has `embedding`, with the tensors of `embedding`, `lstm_head` and `mlp_head`. A SuperGLUE run has "
    "`prompt_embeddings`, and `lstm_head` and `mlp_head`, or `mlp`. From any other file, compute the vectors and put "
    "them into a table (`PTuningConfig(encoder_reparameterization_type=None)`)."
)


def import_ptuning(
    source: AnyPath,
    target: AnyPath,
    base_model: str | None = None,
    placeholder_token_ids: list[int] | int | None = None,
) -> Path:
    """Convert a checkpoint of [THUDM/P-tuning](https://github.com/THUDM/P-tuning) into an adapter of P-Tuning v1.

    The prompt encoder is converted. A run for SuperGLUE trains the language model too and saves it into the same
    folder: give that folder as the base model.

    Args:
        source: The file: a `.ckpt` of a LAMA run, or the `embeddings.pth` of a SuperGLUE run.
        target: A folder that does not exist yet.
        base_model: The folder or Hub name of the language model, for the adapter's config. It is not loaded.
        placeholder_token_ids: The token ids in whose places virtual tokens stand, as in `PTuningConfig`. One id for
            all of them is what the reference implementation has.

    Returns:
        The path of `target`.

    Raises:
        FileExistsError: If `target` exists.
        ValueError: If the source is no such checkpoint, or a part is missing, unknown, not finite or of another shape.
        OSError: If a file cannot be read or written.

    Example:
        ```python
        import_ptuning("epoch_30_dev_42.0_test_43.1.ckpt", "capital", base_model="bert-base-cased")
        ```
    """
    target, source = check_free(target), Path(source)
    if not source.is_file():
        raise ValueError(f"There is no file {source}. Name the checkpoint file: a .ckpt, or embeddings.pth.")
    encoder = _read_encoder(source)
    kind: EncoderType = "LSTM" if "lstm.weight_hh_l0" in encoder else "MLP"
    width = encoder.get("lstm.weight_hh_l0", encoder["hidden.weight"].T).shape[-1]
    length, size = encoder["embedding.weight"].shape
    needed = PromptSizes(length, size, kind, width).shapes
    misfits = find_misfits(shapes_of(encoder), needed, {})
    if misfits:
        raise ValueError(f"{source} has no prompt encoder of P-tuning: {'; '.join(misfits)}. {_LAYOUTS}")
    config = PTuningConfig(
        num_virtual_tokens=length,
        placeholder_token_ids=placeholder_token_ids,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=width,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    with new_folder(target) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in encoder.items()}
        root = f"{SAVED_ROOT}{LAYER_NAME}.{PREFIX}"
        save_file(with_root(root, tensors), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)
    return target


def _read_encoder(source: Path) -> dict[str, Tensor]:
    """Read the tensors of a prompt encoder, by their names in our `PromptEncoder`."""
    parts = read_state_dicts(source, _IGNORED)
    theirs = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    encoder = {}
    for name, tensor in theirs.items():
        root = next((each for each in _NAMES if name.startswith(each)), None)
        if root is None:
            raise ValueError(
                f"{source} has {shorten(name)}, which is no part of P-tuning's prompt encoder. {_LAYOUTS}"
            )
        encoder[_NAMES[root] + name.removeprefix(root)] = tensor
    if any(name not in encoder or encoder[name].dim() != 2 for name in ("embedding.weight", "hidden.weight")):
        raise ValueError(f"{source} is no checkpoint of P-tuning: it has no prompt encoder. {_LAYOUTS}")
    broken = [name for name, tensor in encoder.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} has values that are not finite, in {shorten(', '.join(broken))}.")
    return encoder
