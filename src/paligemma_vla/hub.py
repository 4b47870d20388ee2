"""The Hugging Face hub: whether a backbone can be had, a policy downloaded by its id, an export uploaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paligemma_vla.errors import CheckpointError, ModelError, StorageError, first_line
from paligemma_vla.storage import read_failure

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
POLICY_FILES = ("*.json", "*.safetensors")  # what a policy is read from: neither the card nor exported programs
EXPORTED_FILES = (*POLICY_FILES, "*.pt2")
LOG_IN = "`hf auth login`, or HF_TOKEN"


def is_hub_id(location: str) -> bool:
    """Whether a location is `org/name` or `org/name@revision` on the hub, rather than a path."""
    is_file = os.path.lexists(location) or location.endswith((".tar", ".pth", ".pt"))
    return not is_file and HUB_ID.fullmatch(location) is not None


@contextmanager
def backbone_errors(name: str) -> Iterator[None]:
    """Any error while a backbone is loaded becomes a `ModelError` with reason and remedy."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # of any kind: a folder that is almost right raises KeyError, AttributeError, ...
        raise _backbone_error(name, read_failure(name, error)) from error


def check_backbone(name: str, revision: str | None) -> None:
    """Raise `ModelError` when a backbone is neither a folder nor on the hub.

    One small file is asked for: an unreachable hub is given up after half a minute instead of many.
    """
    from huggingface_hub import errors, hf_hub_download

    if os.path.isdir(name):
        return
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # of any kind: no network, a name that cannot be one, a proxy that answers something else
        reasons = {
            errors.GatedRepoError: "it is gated",
            errors.RevisionNotFoundError: f"the hub has no revision '{revision}' of it: model.vlm_config.revision",
            errors.RepositoryNotFoundError: "it is neither a folder here nor a model on the hub that you may see",
        }
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), first_line(error))
        raise _backbone_error(name, reason) from error


def _backbone_error(name: str, reason: str) -> ModelError:
    return ModelError(
        f"model.vlm_config.model_name_or_path: cannot load '{name}' ({reason})\n"
        "  a local folder must hold config.json, *.safetensors and the processor's files;\n"
        f"  a gated model needs its licence accepted at https://huggingface.co/{name}, then {LOG_IN} of the same account;\n"
        "  without a network, download it elsewhere and give the folder: --model_path_override FOLDER"
    )


def download_policy(location: str | Path) -> str:
    """The local file or folder of a policy: `org/name[@revision]` is downloaded, anything else returned as it is.

    Raises `CheckpointError` when the hub has no such policy, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    text = os.fspath(location)
    if not is_hub_id(text):
        return text
    name, _, revision = text.partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, allow_patterns=list(POLICY_FILES)))
    except Exception as error:  # of any kind: network, permissions, cache, each with errors of its own
        raise CheckpointError(
            f"{text}: no such file or folder here, and the Hugging Face hub does not give it ({first_line(error)})\n"
            "  a policy on the hub is org/name or org/name@revision;\n"
            f"  a private or gated one needs {LOG_IN}, and its licence accepted;\n"
            "  without a network, download it elsewhere and give the folder"
        ) from error


def check_can_push(name: str) -> None:
    """Raise `StorageError` unless somebody is logged in to a hub that answers: before minutes of work, not after them."""
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(name) or "@" in name:
        raise StorageError(f"--push_to_hub {name}: expected org/name, in letters, digits and -_.")
    with _push_errors(name, ""):
        HfApi().whoami()


def push(folder: Path, name: str, private: bool) -> str:
    """Put an exported folder on the hub, in place of an earlier export there; returns its address.

    Raises `StorageError`; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    with _push_errors(name, f"\n  {folder} is complete: `hf upload {name} {folder}` goes on"):
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Export of PaliGemma-VLA",
            delete_patterns=list(EXPORTED_FILES),
        )
    return str(address)


@contextmanager
def _push_errors(name: str, hint: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind, as above
        raise StorageError(
            f"--push_to_hub {name}: the Hugging Face hub does not take it ({first_line(error)})\n"
            f"  log in with a token that may write: {LOG_IN};\n"
            f"  HF_HUB_OFFLINE=1, and a machine without a network, keep everything here{hint}"
        ) from error
