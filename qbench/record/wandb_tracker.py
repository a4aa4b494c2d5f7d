"""One Weights & Biases run per point: config, summary, per-layer table. A failure here never loses a result.

Online if an API key is configured, else offline (upload later with `wandb sync`), and never a prompt. The run id is
the point's run_id, so measuring a point again updates its run instead of adding one.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qbench.config import TrackerConfig
from qbench.errors import RequestError
from qbench.record.result import LayerRow, Result

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")


def check(config: TrackerConfig) -> None:
    """Raises RequestError before anything is measured if the tracker cannot work at all."""
    if config.mode not in MODES:
        raise RequestError(f"tracker.mode must be one of {', '.join(MODES)}, got '{config.mode}'")
    if importlib.util.find_spec("wandb") is None:
        raise RequestError("tracker=wandb needs the package wandb: pip install 'qbench-llm[wandb]', or tracker=none")


def track(result: Result, config: TrackerConfig, folder: Path) -> None:
    """Logs the point; warns, and returns, when W&B cannot be reached or refuses."""
    try:
        import wandb

        mode = config.mode
        if mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type="point",
            id=result.run_id,
            resume="allow" if mode == "online" else None,
            name="-".join(str(result.summary()[key]) for key in ("model", "quantizer", "nbits")),
            tags=[str(result.summary()["model"]), str(result.summary()["quantizer"])],
            config=result.config | {"environment": result.environment},
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True),
        )
        try:
            if result.quantization is not None and result.quantization.layers:
                run.log({"layers": _table(wandb, result.quantization.layers)})
            run.summary.update({key: value for key, value in result.summary().items() if value is not None})
        finally:
            run.finish(exit_code=0 if result.status == "ok" else 1)
    except Exception as error:
        log.warning("the result is saved, but Weights & Biases failed: %s", error)


def _has_key(wandb: Any) -> bool:
    """True if a key is configured by environment or netrc; asks nobody."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False


def _table(wandb: Any, layers: list[LayerRow]) -> Any:
    columns = [field.name for field in fields(LayerRow)]
    rows = [[str(v) if isinstance(v, tuple) else v for v in asdict(layer).values()] for layer in layers]
    return wandb.Table(columns=columns, data=rows)
