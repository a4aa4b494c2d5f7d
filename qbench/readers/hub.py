"""Repositories of the Hugging Face Hub: which commit a revision is, and a snapshot of just the files that are needed.

Nothing is fetched that was not asked for. A model or file is read from the snapshot's folder, never by its name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from qbench.errors import RequestError

COMMIT = re.compile(r"[0-9a-f]{40}")
WITHOUT_NETWORK = {
    "model": "use model=smollm2-135m (embedded) or model=local model.path=DIR",
    "quantizer": "name what is here: quantizer.path=FILE_OR_DIR",
}


@cache  # one process asks once: all points of a sweep are of one commit
def commit(repository: str, revision: str | None, node: str = "model") -> str:
    """The commit, 40 hex digits, that `revision` (a branch, tag or commit; None: the main branch) is at.

    Asks the Hub, or where that cannot be reached the cache of earlier downloads; raises RequestError if neither knows.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    return fetch(repository, revision, ["config.json"], node=node).name


def fetch(
    repository: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = (), node: str = "model"
) -> Path:
    """The snapshot's folder, whose name is the commit, once it holds the files of the repository that match.

    `node` is the part of the configuration that names the repository, model or quantizer. Raises RequestError, about
    the setting of it that is to blame.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    key = "model" if node == "model" else f"{node}.id"
    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*ignored] or None
        )
    except GatedRepoError:
        reason = "it is gated: accept its licence on its page there, then log in with: hf auth login"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private and no token of yours opens it (hf auth login)"
    except RevisionNotFoundError:
        reason, key = f"it has no revision {revision}", f"{node}.revision"
    except Exception as error:  # whatever the network brings
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        reason = f"{first_line}; without network {WITHOUT_NETWORK[node]}"
    else:
        return Path(found)
    asked = "" if key == "model" else f"{key}: "
    raise RequestError(f"{asked}cannot get {repository} from the Hugging Face Hub: {reason}", key=key)


def file_names(repository: str, revision: str | None) -> list[str]:
    """The files of a repository; empty where the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        about = HfApi().model_info(repository, revision=revision)
    except Exception:  # whatever the network brings: it is asked for a sentence alone
        return []
    return sorted(sibling.rfilename for sibling in about.siblings or [])
