"""A packed checkpoint, as export.dir writes it: quantized already, nothing is quantized; the original is not here."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from qbench.checkpoint import manifest
from qbench.checkpoint import packed as checkpoint
from qbench.errors import RequestError
from qbench.layers.experts import QuantExperts
from qbench.sources import pretrained
from qbench.sources.source import LoadedModel


@dataclass(frozen=True)
class Packed:
    """The checkpoint in `path`, known by the name of the model that it was made of."""

    original: ClassVar[bool] = False
    name: str = "packed"
    path: str | None = None

    def named(self, given: Collection[str]) -> Packed:
        if self.name != "packed":
            return self
        return replace(self, name=f"{self._origin().get('model', {}).get('name', 'unknown')}-packed")

    def pinned(self) -> Packed:
        return self

    def folder(self) -> Path:
        """Where the checkpoint lies; raises RequestError if no folder is named."""
        if not self.path:
            raise RequestError(f"model={self.name} needs model.path=DIR, a packed checkpoint written by export.dir=DIR")
        return Path(self.path).expanduser()

    def fingerprint(self) -> str:
        folder = self.folder()
        manifest.read(folder)
        return f"packed:{hashlib.sha256((folder / manifest.MANIFEST).read_bytes()).hexdigest()[:32]}"

    def made_by(self) -> dict[str, Any]:
        """The method, and the name of the transform before it."""
        origin = self._origin()
        transform = {"transform": origin["transform"]["name"]} if origin.get("transform") else {}
        return origin.get("quantizer", {"name": "unknown"}) | transform

    def tokenizer(self, cache: Path) -> Any:
        folder = self.folder()
        manifest.verify(folder, manifest.read(folder), weights=False)
        return pretrained.read_tokenizer(folder, str(folder))

    def configuration(self) -> None:  # as large as its weights: it is looked at once it is loaded
        return None

    def skeleton(self) -> None:  # its bytes are those of the point that made it
        return None

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        """As Source.load; `offload` changes nothing, as there are no linear weights in 16 bit."""
        identity, folder = identity or self.fingerprint(), self.folder()
        about = self._origin().get("model", {})
        note = f"a packed checkpoint, its original is not here. {about.get('note', '')}"
        # a cast of the whole model would reach the stored rotary frequencies: it is made in there
        model = checkpoint.load(folder, dtype, device, {"QuantExperts": lambda old, w: QuantExperts(w, old)})
        return LoadedModel(model, self.tokenizer(cache), identity, note.strip())

    def _origin(self) -> Mapping[str, Any]:
        """What the checkpoint was made of; raises RequestError if there is none."""
        return manifest.read(self.folder())["origin"]
