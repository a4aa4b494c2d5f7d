"""The block types of llama.cpp: `quantizer=gguf/q4_k` and its neighbours, encoded by the package libgguf on the CPU.

Q4_0 to Q8_0 round to nearest in blocks of 32; the k types have blocks of 256 with scales that are quantized themselves;
the IQ types choose points of a fixed grid. libgguf is llama.cpp's own encoder, compiled by itself. With `imatrix` the
error counts by mean x^2 of each input channel, over the calibration text: what llama.cpp calls an importance matrix.

A type whose blocks do not divide a layer's input channels gives way as it does there (Q4_K to Q5_0, IQ2_XS to IQ4_NL,
and where 32 does not divide them either, to fp16), and the layer's row says so. What llama.cpp calls Q4_K_M is a
mixture of types over a model's layers; a quantizer here has one type for all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qbench.format.gguf import GGUFBlocks, of_blocks, row_bytes
from qbench.format.gguf_blocks import TYPES
from qbench.quant.quantizer import InputStatistics, Quantizer, Statistic

INSTALL = "install it with: pip install 'libgguf>=0.2.2,<0.3'"
# where blocks of 256 do not divide a row; every other type gives way to fp16
GIVES_WAY = dict.fromkeys(("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL")
GIVES_WAY |= dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")
GIVES_WAY |= {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
BLIND = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")  # llama.cpp does not make these without an importance matrix
LARGEST = 65504.0  # of fp16


@dataclass(frozen=True)
class GGUFQuantizer(Quantizer):
    """One type for every layer; raises ValueError without libgguf, or for a type that needs a matrix and has none."""

    type: ClassVar[str] = ""

    imatrix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type in BLIND and not self.imatrix:
            raise ValueError(f"{self.type} is only made with an importance matrix: use quantizer.imatrix=true")
        encoder()

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.INPUT_SQUARES} if self.imatrix else ())

    def quantize_one(self, weight: Tensor, stats: InputStatistics | None = None) -> GGUFBlocks:
        rows = weight.detach().float().cpu().contiguous()
        importance = self._importance(rows, stats) if self.imatrix else None
        type = settled(self.type, rows.shape[1])
        if type == "F16":
            if rows.numel() and rows.abs().max() > LARGEST:
                raise ValueError(f"no type has blocks for {rows.shape[1]} channels, and a weight is too large for fp16")
            blocks = rows.half().view(torch.uint8)
        else:
            blocks = encode(rows.numpy(), type, importance)
        gave_way = "" if type == self.type else f" (no blocks of {self.type} in {rows.shape[1]} input channels)"
        return of_blocks(type, blocks.to(weight.device), f"{type}{gave_way}")

    def stored_bytes(self, rows: int, columns: int) -> int:
        """What a weight `[rows, columns]` takes, without quantizing it."""
        return rows * row_bytes(settled(self.type, columns), columns)

    def _importance(self, rows: Tensor, stats: InputStatistics | None) -> np.ndarray:
        if stats is None or stats.squares is None:
            raise ValueError("an importance matrix needs mean x^2 of the layer's inputs: run it with calibration data")
        squares = stats.squares.float().cpu()
        if squares.shape != rows.shape[1:]:
            raise ValueError(f"the weights have {rows.shape[1]} input channels, mean x^2 has {list(squares.shape)}")
        if not torch.isfinite(squares).all():
            raise ValueError("the calibration inputs of the layer hold NaN or Inf")
        if not (squares > 0).any():
            raise ValueError("the inputs are zero throughout: no calibration token reached this layer")
        return squares.numpy()


def settled(type: str, columns: int) -> str:
    """The type that a row of so many weights gets where `type` is asked for, as llama.cpp decides it."""
    for candidate in (type, GIVES_WAY.get(type)):
        if candidate and columns % TYPES[candidate].weights == 0:
            return candidate
    return "F16"


def encode(rows: np.ndarray, type: str, importance: np.ndarray | None) -> Tensor:
    """Blocks of fp32 `[out, in]`, uint8 `[out, bytes of a row]`; rows do not depend on each other."""
    package = encoder()
    number, threads = package.GGMLQuantizationType[type], max(1, min(torch.get_num_threads(), len(rows)))

    def some(part: np.ndarray) -> np.ndarray:
        return package.quantize_rows(part, number, importance)

    if threads == 1:
        return torch.from_numpy(some(rows))
    some(rows[:1])  # the grids of the IQ types are made by the first call
    with ThreadPoolExecutor(threads) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(some, np.array_split(rows, threads)))))


def encoder() -> ModuleType:
    """The package; raises ValueError, saying what to install, where it is missing."""
    try:
        import libgguf
    except ImportError as error:
        raise ValueError(f"needs the package libgguf ({error}); {INSTALL}") from None
    return libgguf


@dataclass(frozen=True)
class Q4_0(GGUFQuantizer):
    type: ClassVar[str] = "Q4_0"


@dataclass(frozen=True)
class Q4_1(GGUFQuantizer):
    type: ClassVar[str] = "Q4_1"


@dataclass(frozen=True)
class Q5_0(GGUFQuantizer):
    type: ClassVar[str] = "Q5_0"


@dataclass(frozen=True)
class Q5_1(GGUFQuantizer):
    type: ClassVar[str] = "Q5_1"


@dataclass(frozen=True)
class Q8_0(GGUFQuantizer):
    type: ClassVar[str] = "Q8_0"


@dataclass(frozen=True)
class Q2_K(GGUFQuantizer):
    type: ClassVar[str] = "Q2_K"


@dataclass(frozen=True)
class Q3_K(GGUFQuantizer):
    type: ClassVar[str] = "Q3_K"


@dataclass(frozen=True)
class Q4_K(GGUFQuantizer):
    type: ClassVar[str] = "Q4_K"


@dataclass(frozen=True)
class Q5_K(GGUFQuantizer):
    type: ClassVar[str] = "Q5_K"


@dataclass(frozen=True)
class Q6_K(GGUFQuantizer):
    type: ClassVar[str] = "Q6_K"


@dataclass(frozen=True)
class IQ1_S(GGUFQuantizer):
    type: ClassVar[str] = "IQ1_S"

    imatrix: bool = True


@dataclass(frozen=True)
class IQ1_M(GGUFQuantizer):
    type: ClassVar[str] = "IQ1_M"

    imatrix: bool = True


@dataclass(frozen=True)
class IQ2_XXS(GGUFQuantizer):
    type: ClassVar[str] = "IQ2_XXS"

    imatrix: bool = True


@dataclass(frozen=True)
class IQ2_XS(GGUFQuantizer):
    type: ClassVar[str] = "IQ2_XS"

    imatrix: bool = True


@dataclass(frozen=True)
class IQ2_S(GGUFQuantizer):
    type: ClassVar[str] = "IQ2_S"


@dataclass(frozen=True)
class IQ3_XXS(GGUFQuantizer):
    type: ClassVar[str] = "IQ3_XXS"


@dataclass(frozen=True)
class IQ3_S(GGUFQuantizer):
    type: ClassVar[str] = "IQ3_S"


@dataclass(frozen=True)
class IQ4_NL(GGUFQuantizer):
    type: ClassVar[str] = "IQ4_NL"


@dataclass(frozen=True)
class IQ4_XS(GGUFQuantizer):
    type: ClassVar[str] = "IQ4_XS"


@dataclass(frozen=True)
class TQ1_0(GGUFQuantizer):
    type: ClassVar[str] = "TQ1_0"


@dataclass(frozen=True)
class TQ2_0(GGUFQuantizer):
    type: ClassVar[str] = "TQ2_0"
