"""Models of the Hugging Face Hub: which commit a revision is, and a snapshot of just the files that are needed.

A model is read from the snapshot's folder, never by its name: a folder of that name in the working directory, which
transformers would prefer, is not the Hub's. Nothing is fetched before it is known to be of use: config.json decides
whether the model can be measured, then come tokenizer and settings, then the *.safetensors that are read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from qbench.config import ModelConfig
from qbench.errors import RequestError
from qbench.sources import files as folder

COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(config: ModelConfig) -> ModelConfig:
    """The same model at the commit that its revision is now, under its own name.

    Raises RequestError when the Hub has no such repository or revision, or a model that cannot be measured; of what is
    a commit already, nothing is asked.
    """
    if config.source != "hub":
        return config
    repository = _repository(config)
    name = repository if config.name == "hub" else config.name
    found = replace(config, name=name, revision=commit(repository, config.revision))
    if found.revision != config.revision:  # its config.json is here
        described(found)
    return found


@cache  # one process asks once: all points of a sweep are of one commit
def commit(repository: str, revision: str | None) -> str:
    """The commit, 40 hex digits, that `revision` (a branch, tag or commit; None: the main branch) is at.

    Asks the Hub, or where that cannot be reached the cache of earlier downloads; raises RequestError if neither knows.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    return _fetch(repository, revision, ["config.json"]).name


def described(config: ModelConfig) -> Path:
    """Folder with config.json, and code if it may run; raises RequestError if the model cannot be had or measured."""
    repository, revision = _repository(config), commit(_repository(config), config.revision)
    snapshot = _fetch(repository, revision, ["config.json", *(["*.py"] if config.trust_remote_code else [])])
    if not (snapshot / "config.json").is_file():
        raise RequestError(f"{repository} at {revision} has no config.json on the Hub; is it a model of transformers?")
    folder.check_config(snapshot, repository, config.trust_remote_code)
    return snapshot


def settings(config: ModelConfig) -> Path:
    """The folder of `described`, with all but the weights: tokenizer, generation settings, chat template."""
    return _fetch(_repository(config), described(config).name, folder.SETTINGS)


def weights(config: ModelConfig) -> Path:
    """The folder of `settings`, with the weights."""
    snapshot, name = settings(config), f"{config.id} on the Hub"
    _fetch(_repository(config), snapshot.name, folder.weight_files(snapshot, name, present=False))
    folder.weight_files(snapshot, name)
    return snapshot


def _repository(config: ModelConfig) -> str:
    if not config.id:
        raise RequestError(f"model={config.name}: model.id is not set; say model=ORG/NAME, a repository of the Hub")
    return config.id


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot's folder, whose name is the commit, once it holds the files of the repository that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    # `*` also stands for slashes: original/params.json is not meant, additional_chat_templates/x.jinja is
    below = [f"*/{pattern}" for pattern in folder.SETTINGS if pattern != "*.jinja"]
    ignored = [*below, *folder.BESIDE]
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=[*patterns], ignore_patterns=ignored)
    except GatedRepoError:
        reason = "it is gated: accept its licence on its page there, then log in with: hf auth login"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private and no token of yours opens it (hf auth login)"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except Exception as error:  # whatever the network brings
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        without = "without network use model=smollm2-135m (embedded) or model=local model.path=DIR"
        reason = f"{first_line}; {without}"
    else:
        return Path(found)
    raise RequestError(f"cannot get {repository} from the Hugging Face Hub: {reason}")
