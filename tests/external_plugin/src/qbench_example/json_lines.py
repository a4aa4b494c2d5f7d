"""tracker=json_lines: every point and every sweep is a line of a file, the last one of a run is what holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.errors import RequestError
from qbench.record.result import Result
from qbench.track.tracker import without_places


@dataclass(frozen=True)
class JsonLines:
    file: str = "runs.jsonl"  # in the outputs folder

    def check(self) -> None:
        if Path(self.file).name != self.file:
            raise RequestError(f"tracker.file={self.file} must be the name of a file", key="tracker.file")

    def point(self, result: Result, folder: Path, group: str | None) -> None:
        self._append(folder, {"run": result.run_id, "group": group} | result.summary())

    def sweep(self, results: Sequence[Result], folder: Path, name: str) -> None:
        self._append(folder, {"run": name, "points": sorted(result.run_id for result in results)})

    def _append(self, folder: Path, line: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_places(line)) + "\n")
