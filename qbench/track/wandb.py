"""tracker=wandb: Weights & Biases, one run per point, and one per sweep.

As WANDB_MODE says; without it online if an API key is configured, else offline (upload later with `wandb sync`), and
never a prompt. A run's id follows from what it is about, so measuring a point again, or resuming a sweep, updates its
run instead of adding one.
The points of a sweep share a group: `tracker.group`, or WANDB_RUN_GROUP, or the name of the sweep.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from qbench.errors import RequestError, none_of
from qbench.record.quantization import LayerRow
from qbench.record.result import Result
from qbench.track import pareto
from qbench.track.tracker import sweep_name, without_places

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
LONGEST_TAG = 64
NAMED = ("model", "transform", "quantizer", "nbits")  # of the summary, in the name of a run


@dataclass(frozen=True)
class WandB:
    """tracker=wandb."""

    project: str = "qbench"
    entity: str | None = None
    group: str | None = None  # None: WANDB_RUN_GROUP, else the sweep's name
    mode: str = "auto"  # one of MODES

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise none_of("mode", self.mode, MODES)

    def check(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise RequestError(
                "tracker=wandb needs the package wandb: pip install 'qbench-llm[wandb]', or tracker=none"
            )

    def point(self, result: Result, folder: Path, group: str | None) -> None:
        summary = without_places(result.summary())
        columns = {"model_name": summary["model"], "quantizer_name": summary["quantizer"]}  # for the UI to pivot by
        columns |= {key: summary.get(key) for key in ("nbits", "group_size", "protocol")}
        about = {
            "job_type": "point",
            "group": self._group(group),
            "id": result.run_id,
            "name": "-".join(str(summary[key]) for key in NAMED if summary.get(key) is not None),
            "tags": _tags(
                result.status, *(summary.get(key) for key in ("model", "transform", "quantizer", "protocol"))
            ),
            "config": without_places(result.config) | columns | {"environment": result.environment},
        }

        def fill(wandb: Any, run: Any) -> None:
            media = _histograms(wandb, result, folder)
            if result.quantization is not None and result.quantization.layers:
                media["layers"] = _layers(wandb, result.quantization.layers)
            if media:
                run.log(media)
            run.summary.update({key: value for key, value in summary.items() if value is not None})

        self._log_run(fill, about, folder, failed=result.status != "ok")

    def sweep(self, results: Sequence[Result], folder: Path, name: str) -> None:
        """The leaderboard of the sweep as a table, its trade-offs as images."""
        run_ids = [result.run_id for result in results]
        results = sorted(results, key=_place)
        summaries = [without_places(result.summary()) for result in results]
        failed = sum(result.status != "ok" for result in results)
        own = sweep_name(run_ids)  # points of one sweep may go to several projects and folders
        about = {
            "job_type": "sweep",
            "id": own,
            "name": own,
            "tags": _tags("sweep", *sorted({str(s["model"]) for s in summaries})),
            "config": {"points": run_ids},
            "group": self._group(name),
        }

        def fill(wandb: Any, run: Any) -> None:
            keys = list(dict.fromkeys(key for summary in summaries for key in summary))
            rows = [[summary.get(key) for key in keys] for summary in summaries]
            run.log({"leaderboard": wandb.Table(columns=keys, data=rows)} | _plots(wandb, results))
            run.summary.update({"points": len(results), "ok": len(results) - failed, "failed": failed})

        self._log_run(fill, about, folder, failed=failed > 0)

    def _group(self, sweep: str | None) -> str | None:
        return self.group or os.environ.get("WANDB_RUN_GROUP") or sweep

    def _log_run(self, fill: Callable[[Any, Any], None], about: dict[str, Any], folder: Path, failed: bool) -> None:
        mode = self.mode if self.mode != "auto" else os.environ.get("WANDB_MODE", "auto").strip().lower()
        if mode == "disabled":
            return
        import wandb

        if mode not in MODES or mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
        folder.mkdir(parents=True, exist_ok=True)
        with self._run(wandb, about, folder, mode, failed) as run:
            fill(wandb, run)
            kept = Path(run.dir).parent
        if mode == "offline":  # an upload of the earlier one as well would mix two measurements in one run
            for earlier in folder.glob(f"wandb/offline-run-*-{about['id']}"):
                if earlier.resolve() != kept.resolve():
                    shutil.rmtree(earlier, ignore_errors=True)

    @contextmanager
    def _run(self, wandb: Any, about: dict[str, Any], folder: Path, mode: str, failed: bool) -> Iterator[Any]:
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True, host=""),
            **about,
        )
        try:
            yield run
        finally:
            run.finish(exit_code=int(failed))


def _has_key(wandb: Any) -> bool:
    """True if a key is configured by environment or netrc; asks nobody."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False


def _tags(*names: Any) -> list[str]:
    return [str(name)[:LONGEST_TAG] for name in names if name]


def _place(result: Result) -> tuple[str, bool, str, float]:
    """By model and protocol, the best first, as its first number tells; what failed comes last."""
    protocol, _, number = next(result.numbers(), ("", "", None))
    return str(result.config["model"]["name"]), number is None, protocol, 0.0 if number is None else number.loss


def _histograms(wandb: Any, result: Result, folder: Path) -> dict[str, Any]:
    """The mean NLL per window of the model, and of the original: whether a loss is spread or sits in a few windows."""
    found = {}
    for index, record in enumerate(result.evaluation):
        try:
            tensors = load_tensors((folder / "results" / result.run_id / record.window_nll_file).read_bytes())
        except (OSError, SafetensorError):
            continue
        suffix = f"/{record.protocol}" if index else ""
        for key, name in (("quantized", "window_nll"), ("baseline", "baseline_window_nll")):
            if key in tensors:
                found[name + suffix] = wandb.Histogram(tensors[key].tolist())
    return found


def _layers(wandb: Any, layers: Sequence[LayerRow]) -> Any:
    """One row a layer; what a row holds by name (stored_bytes, diagnostics) becomes columns of their own."""
    rows = []
    for layer in layers:
        row: dict[str, Any] = {}
        for key, value in asdict(layer).items():
            if isinstance(value, dict):
                row |= {f"{key}.{inner}": number for inner, number in value.items()}
            else:
                row[key] = str(list(value)) if isinstance(value, tuple) else value
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])


def _plots(wandb: Any, results: Sequence[Result]) -> dict[str, Any]:
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("the sweep is tracked without its plots: pip install 'qbench-llm[wandb]' brings matplotlib")
        return {}
    plots = pareto.plots(results)
    return {f"pareto/{title}": wandb.Image(image, caption=title) for title, image in plots.items()}
