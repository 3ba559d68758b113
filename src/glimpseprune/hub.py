"""The hub of Hugging Face: what is asked of it, and what is said when it has no answer.

A name is asked of the hub only if it cannot mean a folder: ``owner/name``, where neither is here. All files that are
wanted come with one request for their list, which waits for seconds, not minutes; offline, what was downloaded before
is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from glimpseprune import resources
from glimpseprune.config import UserError

LOCAL = ("runs", "conf", "data")
"""Folders into which our own examples write: their names are never those of an owner."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.yaml")
PUBLISHED = "new_modules_gp.pt"
ALL = (*SMALL, "*.safetensors", PUBLISHED)
PATIENCE = 5.0
"""Seconds for the list of files, unless HF_HUB_ETAG_TIMEOUT says otherwise."""


def is_id(name: str | Path) -> bool:
    """Whether ``name`` can only be a repository of the hub: owner/name, and nothing that begins so is here."""
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
    owner, _, _ = str(name).partition("/")
    shaped = re.fullmatch(f"{part}/{part}", str(name))
    return bool(shaped) and owner not in LOCAL and not resources.there(name) and not resources.there(owner)


def folder(name: str | Path, wanted: Sequence[str] = ALL, download: bool = True) -> Path:
    """The folder ``name``: of this machine, of the package, or of a repository of the hub, whose files that match
    ``wanted`` are downloaded if need be.

    Raises:
        UserError: none of them; it says where was looked.
    """
    require_name(name)
    found = Path(resources.find(name))
    try:
        if found.is_dir():
            return found
    except (OSError, ValueError):
        pass
    if resources.there(found):
        raise UserError(f"'{name}' is a file: give the folder that it is in")
    if not is_id(name):
        owner = str(name).partition("/")[0]
        beside = owner and str(name).count("/") == 1 and resources.there(owner)
        hint = f"; '{owner}' is a folder here, so the hub is not asked" if beside else ""
        raise UserError(f"no checkpoint at '{name}': there is no such folder (seen from {Path.cwd()}){hint}")
    return _downloaded(str(name), wanted, download)


def require_name(name: object) -> None:
    """Raise UserError unless it is something that could name a checkpoint."""
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise UserError(f"a checkpoint is a folder or the id of a hub repository, not {name!r}")


def _downloaded(name: str, wanted: Sequence[str], download: bool) -> Path:
    from huggingface_hub import snapshot_download

    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(wanted), etag_timeout=patience, local_files_only=not download)
        )
    except Exception as error:  # of HTTP, of the hub, of the disk
        kind = type(error).__name__
        answers = {
            "GatedRepoError": "that its licence must be accepted there first (then: hf auth login)",
            "RepositoryNotFoundError": "that there is no such repository, or not for you (hf auth login)",
            "LocalEntryNotFoundError": "nothing: it cannot be reached, and nothing of it was downloaded before",
            "OfflineModeIsEnabled": "nothing: HF_HUB_OFFLINE is set, and nothing of it was downloaded before",
        }
        if not download:
            raise UserError(
                f"'{name}': there is no such folder, and it was not downloaded; "
                f"if it is a hub id: `hf download {name}` where there is a network"
            ) from None
        said = answers.get(kind) or f"{kind}: {(str(error).strip().splitlines() or [''])[0]}"
        raise UserError(
            f"no checkpoint at '{name}': no such folder (seen from {Path.cwd()}), and the hub says {said}"
        ) from None
