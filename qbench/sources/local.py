"""A folder with config.json, a tokenizer and *.safetensors, as save_pretrained writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from qbench.checkpoint import manifest
from qbench.errors import RequestError
from qbench.sources import files, pretrained
from qbench.sources.source import LoadedModel
from qbench.sources.stream import Stream


@dataclass(frozen=True)
class Local:
    """The model of `path`, known by the folder's name."""

    original: ClassVar[bool] = True
    name: str = "local"
    path: str | None = None
    trust_remote_code: bool = False

    def named(self, given: Collection[str]) -> Local:
        if not self.path or self.name != "local":
            return self
        return replace(self, name=os.path.basename(os.path.abspath(os.path.expanduser(self.path))) or self.name)

    def pinned(self) -> Local:
        return self

    def folder(self) -> Path:
        """The folder; raises RequestError unless it holds a model that can be measured."""
        if not self.path:
            raise RequestError(f"model={self.name} needs model.path=DIR, a folder with config.json and *.safetensors")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise RequestError(f"model.path={self.path} is not a folder; it must hold config.json and *.safetensors")
        if (folder / manifest.MANIFEST).is_file():
            raise RequestError(f"model.path={folder} is a packed checkpoint: use model=packed model.path={folder}")
        if not (folder / "config.json").is_file():
            raise RequestError(f"model.path={folder} has no config.json; is it a folder written by save_pretrained?")
        files.check_config(folder, f"model.path={folder}", self.trust_remote_code)
        files.weight_files(folder, f"model.path={folder}")
        return folder

    def fingerprint(self) -> str:
        return f"local:{files.fingerprint(self.folder())}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return pretrained.read_tokenizer(folder := self.folder(), str(folder), self.trust_remote_code)

    def configuration(self) -> Any:
        return pretrained.read_configuration(folder := self.folder(), str(folder), self.trust_remote_code)

    def config_json(self) -> dict[str, Any]:
        return json.loads((self.folder() / "config.json").read_text(encoding="utf-8"))

    def skeleton(self) -> Any | None:
        return pretrained.without_storage(self.configuration, self.trust_remote_code)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        identity = identity or self.fingerprint()
        tokenizer, folder = self.tokenizer(cache), self.folder()
        model = pretrained.read_model(folder, str(folder), dtype, device, offload, self.trust_remote_code)
        return LoadedModel(model, tokenizer, identity)

    def stream(
        self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None
    ) -> Stream | None:
        folder = self.folder()
        return pretrained.read_stream(folder, str(folder), dtype, device, self.trust_remote_code)
