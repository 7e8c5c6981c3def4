"""Upload of an adapter to the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files.card import CARD, read_card
from ..messages import shorten
from ..tuner.model import nested_models, own_adapters

# Files of a training run that are not uploaded.
_IGNORED_FILES = ["checkpoints/*", "logs/*", ".*"]


def push_to_hub(
    adapter: PeftModel | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload the adapters of a model, or the folder of a saved adapter, with their model card.

    `model.push_to_hub` uploads the same files, but rejects a model with a PEFT model inside. Here the adapters of both
    are uploaded. The adapters of a model keep the text that the repository's card has besides ours. The card of a
    folder replaces that of the repository.

    Args:
        adapter: A model wrapped by PEFT, or the folder of a saved adapter. The checkpoints and logs of a training run
            are not uploaded.
        repo_id: The repository's name on the Hub, `user/name`. It is created if it does not exist.
        private: Whether a new repository is private; the default of the user or organisation if `None`.
        token: The Hub token; the token of the last login if `None`.
        **kwargs: Arguments of `huggingface_hub.HfApi.upload_folder` (`commit_message`, `revision`, `create_pr`, ...).

    Returns:
        The commit.

    Raises:
        ValueError: If the folder has no adapter, or has a link to a file outside of it, which would be uploaded; if
            the card in the repository is damaged; or if a PEFT model and the one inside it have adapters of one name.
        huggingface_hub.errors.HfHubHTTPError: If the Hub rejects the upload.

    Example:
        ```python
        push_to_hub("runs/ner", "user/ner", private=True)
        ```
    """
    options = {"commit_message": "Upload prefix adapter", "ignore_patterns": _IGNORED_FILES, **kwargs}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if isinstance(adapter, (str, os.PathLike)):
            folder = Path(adapter)
            _check_folder(folder)
        else:
            _check_names(adapter)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not isinstance(adapter, (str, os.PathLike)):
            published = _published_card(api, repo_id, options.get("revision"))
            if published is not None:
                published.save(folder / CARD)
            for model in nested_models(adapter):
                model.save_pretrained(scratch, selected_adapters=own_adapters(model))
            if published is not None:
                _restore_tags(folder / CARD, published)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def _published_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """The card of a repository; `None` if it has none."""
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return read_card(Path(path).resolve())


def _restore_tags(path: Path, published: ModelCard) -> None:
    """Add the tags that a card had before PEFT replaced them."""
    card = read_card(path)
    if card is not None:
        own = [tag for tag in published.data.get("tags") or () if not str(tag).startswith("base_model:")]
        card.data["tags"] = sorted({*own, *(card.data.get("tags") or ())})
        card.save(path)


def _check_names(model: PeftModel) -> None:
    """Reject two PEFT models, one inside the other, with adapters of one name: one would replace the other."""
    names = [name for each in nested_models(model) for name in own_adapters(each)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{twice[0]!r} is the name of an adapter of this PEFT model, and of one of the PEFT model inside, and a "
            "repository has one of each name. Save each from its own model into a folder of its own, and upload the "
            "folders; or give them different names from the start: `get_peft_model(model, config, NAME)`."
        )


def _check_folder(folder: Path) -> None:
    """Reject a folder without an adapter, or with a link to a file outside of it."""
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no adapter: it has no {' and no '.join(missing)}.")
    outside = [path for path in folder.rglob("*") if not path.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ValueError(
            f"{shorten(str(outside[0]))} is a link to {shorten(str(outside[0].resolve()))}, outside of the adapter's "
            "folder, and the upload would include that file. Copy the file into the folder, or remove the link."
        )
