"""Reads a folder of results into entries, one for each record that succeeded.

Which records are of the same measurement is decided by the identity in each of them (qbench/record/identity.py). Two
records of one identity, by another qbench version, on another day or CPU, are an earlier and a later measurement.

A file that cannot be read becomes a problem, one sentence for stderr, and never stops the report. Nothing read here is
trusted: a file name inside a result must be plain, and every string is escaped where it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from qbench.errors import RequestError, unknown
from qbench.record.identity import Identity
from qbench.record.quality import DivergenceRecord, MetricRecord
from qbench.record.quantization import FileRecord
from qbench.record.result import Result, ResultError
from qbench.report import naming

# values per window, the weight of each if they differ, and the values in each of several draws, [windows, draws]
Windows = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Score:
    """One quality number of one entry, with the per-window values that its intervals come from."""

    protocol: str
    number: MetricRecord
    text: str  # hash of the scored token ids: only equal ones are paired
    windows: np.ndarray | None = field(compare=False)  # float64 [windows]; None when their file cannot be read
    weights: np.ndarray | None = field(default=None, compare=False)  # tokens of each window, where they differ
    divergence: DivergenceRecord | None = None  # from the 16-bit model's distributions
    draws: np.ndarray | None = field(default=None, compare=False)  # [windows, draws], whose mean `windows` is

    @property
    def metric(self) -> str:
        return self.number.name

    @property
    def value(self) -> float:
        return self.number.value

    @property
    def higher_is_better(self) -> bool:
        return self.number.higher_is_better

    @property
    def loss(self) -> float:
        """The value, turned so that smaller is better."""
        return self.number.loss


@dataclass(frozen=True)
class Entry:
    """One recorded point that succeeded."""

    result: Result
    scores: tuple[Score, ...]

    @property
    def identity(self) -> Identity:
        return self.result.identity

    @cached_property
    def key(self) -> str:
        """Equal for records of the same measurement."""
        return self.identity.key

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value: what `--where` asks for; nothing compares it."""
        return naming.words(self.result)

    @property
    def model(self) -> str:
        return self.result.model.name if self.result.model is not None else str(self.settings.get("model.name"))

    @property
    def quantizer(self) -> str:
        """The method; of a file, its format as the reader tells it: `GGUF Q4_K_M`."""
        return self.identity.method if self.file is None else self.file.made_by

    @property
    def file(self) -> FileRecord | None:
        return self.result.quantization.file if self.result.quantization else None

    @property
    def source(self) -> str:
        """Who made the variant: we, somebody whose file it is, or a method's own package."""
        if self.file is not None:
            return "file"
        return "upstream" if self.quantizer.startswith("upstream/") else "ours"

    @property
    def bits(self) -> Any:
        """Bits of a code: as configured or, for a method that has no such setting, the whole bits per weight."""
        quantization = self.result.quantization
        whole = int(quantization.bits_per_weight) if quantization and isfinite(quantization.bits_per_weight) else None
        return self.identity.quantizer.get("nbits", whole)

    @cached_property
    def weight_error(self) -> float | None:
        """Mean over the layers of ||W - dequantized|| / ||W||; None for a packed checkpoint."""
        return self.result.quantization.weight_error if self.result.quantization else None


@dataclass(frozen=True)
class Recorded:
    entries: list[Entry]  # succeeded, oldest first
    failed: list[Result]
    problems: list[str]  # files that could not be read, one sentence each


class HasSettings(Protocol):
    @property
    def settings(self) -> dict[str, Any]: ...


Configured = TypeVar("Configured", bound=HasSettings)


def latest(entries: Sequence[Entry]) -> list[Entry]:
    """One entry per identity: the one measured last. Of `entries`, the oldest come first."""
    return list({entry.key: entry for entry in entries}.values())


def where(items: Sequence[Configured], conditions: Sequence[str]) -> list[Configured]:
    """The items that have every `KEY=VALUE` among their settings; a key is a dotted one or its last part (`nbits`).

    Raises RequestError, listing what there is, when nothing is left.
    """
    kept = list(items)
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise RequestError(f"--where takes KEY=VALUE, such as quantizer.nbits=4, got '{condition}'")
        present = {k for item in kept for k in item.settings}
        named = {k for k in present if k == key or k.endswith(f".{key}") or k == f"{key}.name"}
        if not named:
            raise unknown("setting", key, present)
        found = {_word(item.settings[k]) for item in kept for k in named & item.settings.keys()}
        kept = [item for item in kept if any(_word(item.settings[k]) == value for k in named & item.settings.keys())]
        if not kept:
            raise unknown(key, value, found)
    return kept


def _word(value: Any) -> str:
    """A setting as `--where` names it, and as YAML does where that is not Python's way."""
    return "null" if value is None else str(value)


def under(entries: Sequence[Entry], protocol: str) -> list[Entry]:
    """The entries with a score under a protocol, and with no other; raises RequestError when there is none."""
    found = {score.protocol for entry in entries for score in entry.scores}
    if protocol not in found:
        raise unknown("protocol", protocol, found)
    kept = (replace(e, scores=tuple(s for s in e.scores if s.protocol == protocol)) for e in entries)
    return [entry for entry in kept if entry.scores]


def unresolved(recorded: Recorded) -> list[Result]:
    """The failed points that no later record of the same identity has made good."""
    done = {entry.key: entry.result.created_utc for entry in recorded.entries}
    return [result for result in recorded.failed if done.get(result.identity.key, "") < result.created_utc]


def read(outputs: Path, run_ids: Collection[str] | None = None, kind: type[Result] = Result) -> Recorded:
    """Every result under `outputs`, or those of `run_ids`; raises RequestError when there is no such folder.

    `kind` is Outline for reports that need no layers.
    """
    folder = outputs / "results"
    if not folder.is_dir():
        raise RequestError(f"{outputs} holds no results/ folder; give the outputs folder of `python -m qbench`")
    recorded = Recorded([], [], [])
    for path in sorted(folder.glob("*/result.json")):
        if run_ids is None or path.parent.name in run_ids:
            _read_one(path, recorded, kind)
    recorded.entries.sort(key=lambda entry: (entry.result.created_utc, entry.result.run_id))
    recorded.failed.sort(key=lambda result: (result.created_utc, result.run_id))
    return recorded


def _read_one(path: Path, recorded: Recorded, kind: type[Result]) -> None:
    place = f"{path.parent.name}/{path.name}"
    try:
        if not path.is_file():
            raise ResultError(f"{place} is not a file")
        result = kind.from_json(path.read_bytes(), place)
    except (OSError, ResultError) as error:
        recorded.problems.append(f"left out: {error}")
        return
    if result.status == "failed":
        recorded.failed.append(result)
    elif result.quantization is None or result.model is None:
        recorded.problems.append(f"left out: {place} is marked ok and has no model or no quantization")
    else:
        scores = tuple(_scores(result, path.parent, recorded.problems))
        recorded.entries.append(Entry(result, scores))


def _scores(result: Result, folder: Path, problems: list[str]) -> Iterator[Score]:
    """A perplexity per evaluation, and every metric of every task."""

    def values(file: str, protocol: str, read: Callable[[Mapping[str, np.ndarray]], Windows]) -> Windows:
        try:
            return read(_tensors(folder, file))
        except (OSError, ValueError, SafetensorError, KeyError) as error:
            problems.append(f"no intervals for {folder.name}, {protocol}: {error}")
            return None, None, None

    for record in result.evaluation:
        windows, weights, draws = values(record.window_nll_file, record.protocol, partial(_nll, count=record.windows))
        yield Score(
            protocol=record.protocol,
            number=record.perplexity,
            text=record.token_ids_sha256,
            windows=windows,
            weights=weights,
            divergence=record.divergence,
            draws=draws,
        )
    for record in result.tasks:
        for metric in record.metrics:
            read = partial(_documents, task=record.task, metric=metric.name)
            windows, weights, draws = values(record.scores_file, record.protocol, read)
            yield Score(
                protocol=record.protocol,
                number=metric,
                text=record.documents_sha256,
                windows=windows,
                weights=weights,
                draws=draws,
            )


def _tensors(folder: Path, name: str) -> dict[str, np.ndarray]:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("its file of scores has a path instead of a name")
    return load_tensors((folder / name).read_bytes())


def _nll(tensors: Mapping[str, np.ndarray], count: int) -> Windows:
    """Mean NLL per window and, where windows differ in length, the tokens of each."""
    nll, tokens = tensors["quantized"].astype(np.float64), tensors.get("tokens")
    if (
        not count
        or nll.shape != (count,)
        or not np.isfinite(nll).all()
        or (tokens is not None and tokens.shape != nll.shape)
    ):
        raise ValueError(f"its file does not hold {count} finite window NLLs")
    return nll, tokens, _table(tensors, "quantized", nll)


def _documents(tensors: Mapping[str, np.ndarray], task: str, metric: str) -> Windows:
    """What each document adds to the metric of a task or group; lm-eval's name of the absent filter is `none`."""
    name = f"quantized/{task}/{metric if ',' in metric else f'{metric},none'}"
    if (found := tensors.get(name)) is None:  # a metric of which that is not known
        return None, None, None
    values = found.astype(np.float64)
    return values, None, _table(tensors, name, values)


def _table(tensors: Mapping[str, np.ndarray], name: str, values: np.ndarray) -> np.ndarray | None:
    """The values in each draw, `[windows, draws]`; None for a point of a single one. Raises ValueError for others."""
    if (table := tensors.get(f"draws/{name}")) is None:
        return None
    table = table.astype(np.float64)
    if (
        table.ndim != 2
        or len(table) != len(values)
        or not np.allclose(table.mean(1), values, rtol=1e-6, equal_nan=True)
    ):
        raise ValueError("its draws are not those of its scores")
    return table
