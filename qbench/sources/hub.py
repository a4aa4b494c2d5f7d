"""Models of the Hugging Face Hub: which commit a revision is, and a snapshot of just the files that are needed.

A model is read from the snapshot's folder, never by its name: a folder of that name in the working directory, which
transformers would prefer, is not the Hub's. Nothing is fetched before it is known to be of use: config.json decides
whether the model can be measured, then come tokenizer and settings, then the *.safetensors that are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from qbench.errors import RequestError
from qbench.readers.hub import commit
from qbench.readers.hub import fetch as fetch_files
from qbench.sources import files, pretrained
from qbench.sources.source import LoadedModel
from qbench.sources.stream import Stream


@dataclass(frozen=True)
class Hub:
    """The repository `id` at `revision` (a branch, tag or commit; None: the main branch)."""

    original: ClassVar[bool] = True
    name: str = "hub"
    id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def named(self, given: Collection[str]) -> Hub:
        name = self.id if "id" in given and self.id else self.name
        at = f"@{self.revision[:8]}" if "revision" in given and self.revision else ""
        return replace(self, name=name + at)

    def pinned(self) -> Hub:
        """The same model at the commit that its revision is now, under its own name.

        Raises RequestError when the Hub has no such repository or revision, or a model that cannot be measured; of
        what is a commit already, nothing is asked.
        """
        repository = self._repository()
        name = repository if self.name == "hub" else self.name
        found = replace(self, name=name, revision=commit(repository, self.revision))
        if found.revision != self.revision:  # its config.json is here
            found.described()
        return found

    def fingerprint(self) -> str:
        return f"hub:{self.id}@{self.pinned().revision}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return pretrained.read_tokenizer(self.settings(), self._repository(), self.trust_remote_code)

    def configuration(self) -> Any:
        return pretrained.read_configuration(self.described(), self._repository(), self.trust_remote_code)

    def config_json(self) -> dict[str, Any]:
        return json.loads((self.described() / "config.json").read_text(encoding="utf-8"))

    def skeleton(self) -> Any | None:
        return pretrained.without_storage(self.configuration, self.trust_remote_code)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        identity, tokenizer = identity or self.fingerprint(), self.tokenizer(cache)
        model = pretrained.read_model(
            self.weights(), self._repository(), dtype, device, offload, self.trust_remote_code
        )
        return LoadedModel(model, tokenizer, identity)

    def stream(
        self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None
    ) -> Stream | None:
        return pretrained.read_stream(self.weights(), self._repository(), dtype, device, self.trust_remote_code)

    def described(self) -> Path:
        """Folder with config.json, and code if it may run; raises RequestError if it cannot be had or measured."""
        repository = self._repository()
        code = ["*.py"] if self.trust_remote_code else []
        snapshot = _fetch(repository, commit(repository, self.revision), ["config.json", *code])
        if not (snapshot / "config.json").is_file():
            raise RequestError(
                f"{repository} at {snapshot.name} has no config.json on the Hub; is it a model of transformers?"
            )
        files.check_config(snapshot, repository, self.trust_remote_code)
        return snapshot

    def settings(self) -> Path:
        """The folder of `described`, with all but the weights: tokenizer, generation settings, chat template."""
        return _fetch(self._repository(), self.described().name, files.SETTINGS)

    def weights(self) -> Path:
        """The folder of `settings`, with the weights."""
        snapshot, name = self.settings(), f"{self.id} on the Hub"
        _fetch(self._repository(), snapshot.name, files.weight_files(snapshot, name, present=False))
        files.weight_files(snapshot, name)
        return snapshot

    def weights_here(self) -> bool:
        """Whether the files with weights are in the cache; asks nothing of the Hub."""
        from huggingface_hub import try_to_load_from_cache

        def held(name: str) -> Path | None:
            found = try_to_load_from_cache(self._repository(), name, revision=self.revision)
            return Path(found) if isinstance(found, str) else None

        if (index := held("model.safetensors.index.json")) is None:
            return held("model.safetensors") is not None
        return all(map(held, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))

    def _repository(self) -> str:
        if not self.id:
            raise RequestError(f"model={self.name}: model.id is not set; say model=ORG/NAME, a repository of the Hub")
        return self.id


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # `*` also stands for slashes: original/params.json is not meant, additional_chat_templates/x.jinja is
    below = [f"*/{pattern}" for pattern in files.SETTINGS if pattern != "*.jinja"]
    return fetch_files(repository, revision, patterns, [*below, *files.BESIDE])
