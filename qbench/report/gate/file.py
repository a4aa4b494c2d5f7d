"""The committed file of the regression gate: what points measured, in one JSON file that reads well in a diff.

    {"schema_version": 2,
     "limits": {...},                           # how much worse is a regression; kept by --update, edited by hand
     "points": [{"command": [...], "identity": {...}, "names": {...}, "packed_bytes": ..., "scores": [...],
                 "layers": {...}}, ...]}

Points are known by their identity (qbench/record/identity.py), not by a run_id: a new qbench version or another CPU
measures the same point, another setting, text or model never does. `names` are for `--where` and for readers. The
per-window scores are in the file, so that the gate's intervals are paired. Equal measurements give an equal file: keys
and points are sorted, floats rounded to more digits than any limit needs, and seconds and memory are stored only where
a limit asks for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qbench.errors import RequestError
from qbench.record.identity import Identity
from qbench.record.quality import Reading
from qbench.record.quantization import LayerRow
from qbench.record.result import first_error
from qbench.report.entries import Entry, Score

SCHEMA_VERSION = 2
_STRICT = ConfigDict(extra="forbid")
UNNAMED = ("outputs=", "runtime.", "tracker", "experiment=")


def named(command: Sequence[str]) -> list[str]:
    """The part of a command that names its point."""
    return [part for part in command if not part.startswith(UNNAMED)]


def label(command: Sequence[str]) -> str:
    return " ".join(named(command)) or "the default point"


@dataclass(frozen=True)
class Limits:
    """How much worse than the gate file's numbers is a regression. Bytes, bits per weight and methods must be equal."""

    quality: float = (
        0.005  # share of the value in the gate file that the whole interval of the difference must lie beyond
    )
    weight_error: float = 0.001  # share by which one layer's relative weight error may grow
    imbalance: float = 0.02  # share by which one layer's imbalance after balancing may grow
    seconds_ratio: float | None = None  # quantizing may take that many times as long; null on machines that are shared
    memory_ratio: float | None = None  # the GPU's peak while quantizing may be that many times as high

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


class GateLayer(NamedTuple):
    """What the gate compares of a layer; in the file, a list of the four."""

    method: str
    packed_bytes: int
    relative_error: float
    imbalance: float | None  # after balancing; None for methods that do not balance

    @staticmethod
    def of(row: LayerRow) -> GateLayer:
        return GateLayer(row.method, row.packed_bytes, _round(row.relative_error), _round(row.imbalance_after))


@dataclass(frozen=True)
class Measured:
    """One quality number with its per-window scores."""

    protocol: str
    metric: str
    reading: Reading  # of what the windows add
    higher_is_better: bool
    text: str  # hash of the scored token ids
    value: float
    windows: list[float]
    weights: list[float] | None = None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @staticmethod
    def of(score: Score) -> Measured:
        """Of a score that has its windows."""
        assert score.windows is not None
        return Measured(
            protocol=score.protocol,
            metric=score.metric,
            reading=score.number.reading,
            higher_is_better=score.higher_is_better,
            text=score.text,
            value=_round(score.value),
            windows=[round(float(x), 8) for x in score.windows],
            weights=None if score.weights is None else [float(x) for x in score.weights],
        )


@dataclass(frozen=True)
class GatePoint:
    """One measurement: what it is of, and what it found."""

    command: list[str]
    identity: Identity
    names: dict[str, Any]  # what `--where` may ask for besides the identity, such as model.name; nothing compares them
    qbench_version: str
    packed_bytes: int
    model_bytes: int
    bits_per_weight: float
    coverage: float
    scores: list[Measured]
    layers: dict[str, GateLayer]
    quant_seconds: float | None = None
    peak_alloc_bytes: int | None = None

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @property
    def label(self) -> str:
        return label(self.command)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value, as an entry's."""
        return self.names | self.identity.flat()

    @staticmethod
    def of(entry: Entry) -> GatePoint:
        quantization = entry.result.quantization
        assert quantization is not None
        identity = entry.identity.flat()
        return GatePoint(
            command=named(entry.result.command),
            identity=entry.identity,
            names={k: v for k, v in entry.settings.items() if k not in identity and v is not None},
            qbench_version=entry.result.qbench_version,
            packed_bytes=quantization.packed_bytes,
            model_bytes=quantization.model_bytes,
            bits_per_weight=_round(quantization.bits_per_weight),
            coverage=_round(quantization.coverage),
            scores=[Measured.of(score) for score in entry.scores if score.windows is not None],
            layers={row.name: GateLayer.of(row) for row in quantization.layers},
            quant_seconds=_round(quantization.quant_seconds),
            peak_alloc_bytes=quantization.peak_alloc_bytes,
        )


@dataclass(frozen=True)
class GateFile:
    points: list[GatePoint]
    limits: Limits = field(default_factory=Limits)
    schema_version: Literal[2] = SCHEMA_VERSION

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @staticmethod
    def read(path: Path) -> GateFile:
        """Raises RequestError for a file that is missing or no gate file."""
        text = _content(path)
        try:
            return TypeAdapter(GateFile).validate_json(text)
        except ValidationError as error:
            if (version := _document(text).get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
                wrong = f"schema_version: it is of version {version}; --update writes it anew and keeps its limits"
            else:
                wrong = first_error(error)
            raise RequestError(f"{path} is not a gate file of schema version {SCHEMA_VERSION}: {wrong}") from None

    @staticmethod
    def read_limits(path: Path) -> Limits:
        """The limits of a gate file of any version; raises RequestError for a file that is missing or no gate file."""
        document = _document(_content(path))
        try:
            return TypeAdapter(Limits).validate_python(document["limits"])
        except KeyError:
            raise RequestError(f"{path} is not a gate file: it has no limits") from None
        except ValidationError as error:
            raise RequestError(f"{path} is not a gate file: limits.{first_error(error)}") from None

    @staticmethod
    def of(entries: Sequence[Entry], limits: Limits) -> GateFile:
        """The gate file that these entries would be; times and memory only where a limit compares them."""
        points = [GatePoint.of(entry) for entry in entries]
        if limits.seconds_ratio is None:
            points = [replace(point, quant_seconds=None) for point in points]
        if limits.memory_ratio is None:
            points = [replace(point, peak_alloc_bytes=None) for point in points]
        return GateFile.ordered(points, limits)

    @staticmethod
    def ordered(points: Sequence[GatePoint], limits: Limits) -> GateFile:
        return GateFile(sorted(points, key=lambda point: (point.label, point.identity.key)), limits)

    def to_json(self) -> str:
        text = json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False)
        return re.sub(r"\[\n[^\[\]{}]*\]", _on_one_line, text) + "\n"  # lists that hold no list


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read the gate file {path}: {error.strerror}; --update writes it") from None


def _document(text: bytes) -> dict[str, Any]:
    """The file as JSON; empty when it is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]")


def _round(value: float | None) -> Any:
    return None if value is None else float(f"{value:.7g}")
