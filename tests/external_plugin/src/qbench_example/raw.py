"""A folder with weights alone: `weights.safetensors` of a two-layer Llama whose shapes are known, and no config.json.

`python -m qbench_example.raw FOLDER` makes one with seeded random weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch

from qbench.errors import RequestError
from qbench.sources import pretrained
from qbench.sources.source import LoadedModel
from qbench.sources.tiny import byte_tokenizer

FILE = "weights.safetensors"


@dataclass(frozen=True)
class Raw:
    """The model of `path`, known by the folder's name."""

    original: ClassVar[bool] = True
    name: str = "raw"
    path: str | None = None

    def named(self, given: Collection[str]) -> Raw:
        return replace(self, name=Path(self.path).resolve().name) if self.path else self

    def pinned(self) -> Raw:  # nothing of a folder moves as a branch does
        return self

    def file(self) -> Path:
        """Raises RequestError unless the weights are there."""
        if not self.path:
            raise RequestError(f"model=raw needs model.path=DIR, a folder with {FILE}", key="model.path")
        file = Path(self.path).expanduser() / FILE
        if not file.is_file():
            raise RequestError(f"model.path={self.path} has no {FILE}", key="model.path")
        return file

    def fingerprint(self) -> str:
        return f"raw:{hashlib.sha256(self.file().read_bytes()).hexdigest()[:32]}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return byte_tokenizer()

    def configuration(self) -> Any:
        return configuration()

    def skeleton(self) -> Any:
        return pretrained.without_storage(configuration)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        model = build()
        try:
            model.load_state_dict(safetensors.torch.load_file(self.file()))
        except (safetensors.SafetensorError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise RequestError(f"model.path={self.path} cannot be read: {first}", key="model.path") from error
        for parameter in model.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        return LoadedModel(pretrained.settled(model, device, offload), byte_tokenizer(), identity or self.fingerprint())


def configuration() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip


def build() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(configuration())


def make(folder: Path, seed: int = 0) -> Path:
    """Writes a model of seeded random weights, fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        safetensors.torch.save_file(build().state_dict(), folder / FILE)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
