"""What a result says of the model and of its quantized weights: bytes, bits, errors, one row a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from qbench.record.strict import Strict
from qbench.record.transform import TransformRecord


@dataclass(frozen=True)
class LayerRow(Strict):
    """One quantized weight."""

    name: str
    shape: tuple[int, ...]  # [out, in]
    method: str  # in effect, which may differ from the one asked for
    backend: str  # what multiplies with it
    seconds: float  # inside the quantizer
    bits_per_weight: float
    packed_bytes: int
    relative_error: float  # ||W - dequantized|| / ||W||
    imbalance_before: float  # geometric mean over tiles of all rows x one group
    imbalance_after: float | None  # None for methods that do not balance
    kurtosis_before: float
    kurtosis_after: float  # of what is rounded, W R / t; as before without a rotation R and an input scale t
    diagnostics: dict[str, float] = field(default_factory=dict)  # what else the method reports, such as a chosen ratio
    # by component, as the weight's format names them: codes, scale, zero, input_scale, codebook, permutation, signs; an
    # input scale that is listed here is stored with the codes, as every method's is: none is folded into another layer
    stored_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedRow(Strict):
    """A linear weight that stays in 16 bit."""

    name: str
    weights: int
    reason: str
    counted: bool = True  # False beside the decoder blocks, with which coverage is not concerned


@dataclass(frozen=True)
class WeightBytes(Strict):
    """Bytes of a loaded model by component, counted from the buffers as held, each once: tied weights are shared."""

    quantized: dict[str, int] = field(
        default_factory=dict
    )  # by component: codes, scale, ... as their formats name them
    linears: int = 0  # linear weights that are not quantized, in the precision of the run
    embeddings: int = 0
    head: int = 0  # 0 when it is tied to the embeddings
    rest: int = 0  # norms, biases, rotary frequencies

    @property
    def codes(self) -> int:
        return self.quantized.get("codes", 0)

    @property
    def aux(self) -> int:
        """What the quantized weights take besides their codes."""
        return sum(self.quantized.values()) - self.codes

    @property
    def total(self) -> int:
        return sum(self.quantized.values()) + self.linears + self.embeddings + self.head + self.rest


@dataclass(frozen=True)
class ModelRecord(Strict):
    name: str
    fingerprint: str
    note: str  # what a reader of its numbers must know; empty for an ordinary checkpoint
    parameters: int
    linear_weights: int  # that count for coverage
    baseline_bytes: int  # every parameter at 16 bit, tied ones once
    weight_bytes: WeightBytes | None = None  # of the original as loaded; None for a packed checkpoint


@dataclass(frozen=True)
class CalibrationRecord(Strict):
    """What a calibrated method was shown; equal hashes and inputs, equal terms."""

    text_source: str
    text_sha256: str
    token_ids_sha256: str
    sequences: int
    tokens: int
    inputs: str = "quantized"  # or original: what each block was shown of the blocks before it
    draws_sha256: list[str] = field(default_factory=list)  # token ids of the draws after the first


@dataclass(frozen=True)
class OtherRow(Strict):
    """A parameter that is no quantized linear and that the variant does not share with the original."""

    name: str
    place: str  # embedding, head or rest: norms, biases, routers
    weights: int
    stored_bytes: int
    method: str  # how it is stored: Q6_K, F32
    relative_error: float  # ||W - what the variant has|| / ||W||

    @property
    def quantized(self) -> bool:
        return 8 * self.stored_bytes < 16 * self.weights


@dataclass(frozen=True)
class FileRecord(Strict):
    """The file or folder that a variant is read from."""

    name: str  # without the folders around it; of the Hub ORG/NAME, with the file
    revision: str | None  # the commit on the Hub
    sha256: str  # over the files that hold weights and settings
    reader: str  # gguf, gptq, ...
    made_by: str  # format and what is known of how it was made: "GGUF Q4_K_M"
    file_bytes: int  # of all files that hold weights
    ignored: dict[str, str] = field(default_factory=dict)  # tensors in it without a place in the model, and why


@dataclass(frozen=True)
class QuantizationRecord(Strict):
    quantizer: str
    calibration: CalibrationRecord | None  # None for calibration-free methods
    quant_seconds: float  # inside the quantizer, all layers
    wall_seconds: float  # the whole phase, diagnostics included
    bits_per_weight: float  # stored codes and aux of the packed linears over their weights
    packed_bytes: int  # codes and aux of the quantized linears, from the buffers
    model_bytes: int  # packed_bytes plus every other parameter: as stored where the variant says, else at 16 bit
    coverage: float  # share of the linear weights really quantized, 0 to 1
    peak_alloc_bytes: int | None  # of the CUDA allocator while quantizing; None on a CPU
    peak_rss_bytes: int | None  # resident memory of the process while quantizing; None where it cannot be reset
    layers: list[LayerRow]  # empty for a packed checkpoint: errors are measured against the original
    skipped: list[SkippedRow]
    weight_bytes: WeightBytes | None = None  # of the quantized model as it ran, in the kernels' layout on a GPU
    embedding_bits: float = 16.0  # stored bits of one of its weights
    head_bits: float = 16.0  # of the output head; those of the embedding where the two are one
    others: list[OtherRow] = field(default_factory=list)  # empty but for a file's variant
    file: FileRecord | None = None
    transform: TransformRecord | None = None

    @property
    def weight_error(self) -> float | None:
        """Mean over the layers of their relative errors; None for a packed checkpoint."""
        return sum(row.relative_error for row in self.layers) / len(self.layers) if self.layers else None
