"""What a source of models offers: a frozen dataclass whose fields are the settings of `model`, and that delivers one.

    @dataclass(frozen=True)
    class Mine:
        original: ClassVar[bool] = True
        name: str = "mine"
        path: str | None = None
        ...

    [project.entry-points."qbench.sources"]
    mine = "my_package.mine:Mine"

It is chosen with `model.source=mine`; a file `model/mine.yaml` in the package's configuration lists `name`, `source`
and the fields that can be set. One that can also give its model a block at a time is a StreamedSource; of any other the
whole model is loaded. qbench.testing.SourceConformance tests what is written here. Whatever cannot be read is a
RequestError in one sentence that names the setting: a folder without a model, a broken file, a Hub out of reach.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from qbench.sources.stream import Stream


@dataclass(frozen=True)
class LoadedModel:
    model: Any  # transformers' causal language model, in eval mode
    tokenizer: Any
    fingerprint: str
    note: str = ""  # what a reader of its numbers must know


class Source(Protocol):
    """A model that can be had; nothing is read or fetched before a method needs it."""

    original: bool  # its weights are in 16 or 32 bits and a quantizer starts from them; False: quantized already
    name: str  # what the model is called in results

    def named(self, given: Collection[str]) -> Self:
        """The same model under a name that is its own.

        `given` are the fields that the command line set. Where one of them makes another model than the configuration's
        (another revision, another seed), it must not go by that name: published numbers would be taken for its own.
        Never asked where the command line gave a name.
        """
        ...

    def pinned(self) -> Self:
        """The same model with what may move (a branch) replaced by what it is now (a commit)."""
        ...

    def fingerprint(self) -> str:
        """Identity of weights, tokenizer and code, without loading: equal ones compute the same, on every machine."""
        ...

    def made_by(self) -> dict[str, Any] | None:
        """The settings, `name` included, of what quantized a model that is quantized already; None of an original."""
        ...

    def tokenizer(self, cache: Path) -> Any:
        """The tokenizer alone, so that a text can be checked before gigabytes of weights are read."""
        ...

    def configuration(self) -> Any | None:
        """transformers' configuration, before a weight is read; None where that takes as long as to load the model.

        Raises RequestError when it says that the model cannot be measured.
        """
        ...

    def skeleton(self) -> Any | None:
        """The model with its shapes and without weights (on the meta device), for sizes; None where it has none.

        Raises files.ModelError when no point of this model can run.
        """
        ...

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        """The model in eval mode in `dtype` on `device`; what has to be converted first is kept under `cache`.

        With `offload` the linear weights stay in host memory (model/offload.py). `identity` is the fingerprint where it
        is known already: a large folder takes minutes to hash.
        """
        ...


class StreamedSource(Source, Protocol):
    """A source of a model that need not fit into memory; nobody has to be one."""

    def stream(
        self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None
    ) -> Stream | None:
        """The weights that `load` gives, to the bit, a block at a time; None for a model that is only to be had whole.

        Arguments as in `load`. Raises RequestError for what `load` refuses, before a weight is read where that can be
        known, as from a file's header.
        """
        ...


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is a number of 64 bits, from {-(2**63)} to {2**64 - 1}; got {seed}")
