"""Policies on the Hugging Face hub: fetched by their id, and put there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from paligemma_vla.errors import CheckpointError, StorageError, first_line
from paligemma_vla.storage import is_url

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
READ = ("*.json", "*.safetensors")  # what a policy is read from: neither the card nor exported programs
OURS = ("*.safetensors", "*.json", "*.pt2")


def local_copy(place: str | Path) -> str:
    """The file or folder on this machine for `place`; what is no path here and looks like `org/name[@revision]` is fetched.

    Raises `CheckpointError` when the hub has no such thing, or cannot be asked.
    """
    text = os.fspath(place)
    if is_url(text) or os.path.lexists(text) or text.endswith((".tar", ".pth", ".pt")) or not HUB_ID.fullmatch(text):
        return text
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, allow_patterns=list(READ)))
    except Exception as error:  # of any kind: network, permissions, cache, each with errors of its own
        raise CheckpointError(
            f"{text}: no such file or folder here, and the Hugging Face hub does not give it ({first_line(error)})\n"
            "  a policy on the hub is org/name or org/name@revision;\n"
            "  a private or gated one needs `hf auth login` or HF_TOKEN, and its licence accepted;\n"
            "  without a network, download it elsewhere and give the folder"
        ) from error


def check_can_push(name: str) -> None:
    """Raise `StorageError` unless somebody is logged in to a hub that answers: before minutes of work, not after them."""
    if not HUB_ID.fullmatch(name) or "@" in name:
        raise StorageError(f"--push_to_hub {name}: expected org/name, in letters, digits and -_.")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # of any kind, as above
        raise StorageError(_not_pushed(name, error)) from error


def push(folder: Path, name: str, private: bool) -> str:
    """Put an exported folder on the hub, in place of what an earlier push put there; returns its address.

    Raises `StorageError`; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export of PaliGemma-VLA", delete_patterns=list(OURS)
        )
    except Exception as error:  # of any kind, as above
        raise StorageError(f"{_not_pushed(name, error)}\n  {folder} is whole: `hf upload {name} {folder}` goes on") from error
    return str(address)


def _not_pushed(name: str, error: BaseException) -> str:
    return (
        f"--push_to_hub {name}: the Hugging Face hub does not take it ({first_line(error)})\n"
        "  log in with a token that may write: `hf auth login`, or HF_TOKEN;\n"
        "  HF_HUB_OFFLINE=1, and a machine without a network, keep everything here"
    )
