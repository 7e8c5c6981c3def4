"""Publishing an adapter on the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..messages import shorten

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel


_NOT_PUBLISHED = ["checkpoints/*", "logs/*", ".*"]


def push_to_hub(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload a model's adapters, or a saved adapter's folder, with the card that says how to load them.

    `model.push_to_hub` uploads the same weights, but puts a card of transformers' in the place of PEFT's and ours.

    Args:
        adapter: a model wrapped by PEFT, or the folder of a saved adapter. A training run's checkpoints and logs stay
            where they are.
        repo_id: the repository's name on the Hub, `user/name`; it is created if it does not exist.
        private: whether a new repository is private; the user's or organisation's default if `None`.
        token: the Hub token; the one that was logged in with if `None`.
        **kwargs: passed on to `huggingface_hub.HfApi.upload_folder` (`commit_message`, `revision`, `create_pr`, ...).

    Returns:
        The commit.

    Raises:
        ValueError: if the folder holds no adapter, or a link to something outside of it, which would be uploaded.
    """
    if isinstance(adapter, (str, os.PathLike)):
        missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (Path(adapter) / name).is_file()]
        if missing:
            raise ValueError(f"{adapter} holds no adapter: it has no {' and no '.join(missing)}.")
        inside = Path(adapter).resolve()
        out = [path for path in Path(adapter).rglob("*") if not path.resolve().is_relative_to(inside)]
        if out:
            raise ValueError(
                f"{shorten(str(out[0]))} is a link to {shorten(str(out[0].resolve()))}, outside of the adapter's "
                "folder, and that would be uploaded. Copy what is meant to be published, or remove the link."
            )
    options = {"commit_message": "Upload prefix adapter", "ignore_patterns": _NOT_PUBLISHED, **kwargs}
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(adapter, (str, os.PathLike)):
            folder = str(adapter)
        else:
            adapter.save_pretrained(scratch)
            folder = scratch
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
