"""The sweeper of qbench as a plugin of Hydra, which looks for plugins below the name `hydra_plugins` and nowhere else.

Every program of Hydra's in this environment imports this module when it starts, so it imports nothing of qbench until
a sweep begins. What a sweep does is in qbench/sweep/sweeper.py.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class QBenchSweeper(Sweeper):
    """hydra/sweeper=qbench: what `-m` means."""

    def __init__(self, params: Any = None, also: Any = None, dry_run: bool = False) -> None:
        """The settings are read from the configuration in `sweep`, where each point's `${...}` is not yet resolved."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        """Raises RequestError when a point cannot be served, and SweepFailed, when all is said, if one has failed."""
        from qbench.sweep.sweeper import run_sweep

        return run_sweep(arguments, self.config, self.hydra_context)
