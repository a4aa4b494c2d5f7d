"""What a reader offers: a frozen dataclass without settings that knows one kind of file, and opens it.

    [project.entry-points."qbench.readers"]
    mine = "my_package.mine:Mine"

`quantizer=file quantizer.path=...` (readers/file.py) asks every reader whether it recognizes the file or folder, opens
it with the one that does, and hands its weights to the pass. Nothing is believed that the file says of itself: lengths
and offsets are checked against its size before anything is allocated, and what does not fit is a ReadError.

Weights go by the names of the model's parameters as transformers has them (`model.layers.0.self_attn.q_proj.weight`,
`lm_head.weight`); one expert's matrices by the names that results give them, fused or not:
`model.layers.0.mlp.experts.3.gate_proj.weight`, `[out, in]` each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qbench.format.format import Format


class ReadError(ValueError):
    """A file that is damaged, or holds what cannot be read: one sentence that names the tensor and the reason."""


@dataclass(frozen=True)
class Entry:
    """What a file says of one weight before its numbers are read."""

    shape: tuple[int, ...]  # of the model's parameter; [out, in] of a linear
    kind: str  # how it is stored, in the words of its format: Q4_K, int4 g128, BF16
    nbytes: int  # stored, codes and aux
    quantized: bool  # False: 16 or 32 bits a weight


class Held(Protocol):
    """A file or folder that is open: its weights by the model's names, none of them read yet."""

    entries: Mapping[str, Entry]
    made_by: (
        str  # format and what is known of how it was made, for people: "GGUF Q4_K_M", "GPTQ, 4 bits, groups of 128"
    )
    file_bytes: int  # of all files that hold weights
    ignored: Mapping[str, str]  # tensors in the file that this model has no place for, with the reason

    def read(self, name: str) -> Format | Tensor:
        """One weight on the CPU: a Format of shape `[out, in]` if its entry is quantized, else a tensor.

        A format's `dequantize` gives the numbers of the format's reference decoder, to the bit in the precision in
        which that one computes. Raises ReadError.
        """
        ...


class Reader(Protocol):
    """One kind of file.

    A reader may also have `check(path)`, which raises ReadError for what can be told without the model, such as a
    folder of several: that is said before any time is spent.
    """

    def recognizes(self, path: Path) -> bool:
        """Whether the file or folder at `path` is of this kind, told from a few bytes of it or its config.json."""
        ...

    def open(self, path: Path, model: Any) -> Held:
        """Reads headers and settings only.

        `model` is the original's skeleton: transformers' model on the meta device, with its config, whose parameters
        the file's tensors are to be matched with. Raises ReadError for a file that is damaged, of another architecture,
        or stores something in a way that nothing here decodes.
        """
        ...
