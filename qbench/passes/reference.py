"""The original's numbers for a protocol, kept and shared: its scores, and its hidden states after the last block.

From the states a later pass recomputes the original's exact logits through the model's own norm and head, so that a KL
is exact whichever variants are measured together. They are tokens x hidden in the model's precision: 0.6 GB for the
whole WikiText-2 test on a 1B model, 2.5 GB on an 8B; `task.divergence=false` keeps none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbench import __version__
from qbench.evaluate.protocol import Scores
from qbench.passes.states import States
from qbench.record.store import Store, identity, require_about

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """States in a file, read a batch at a time, as `States` give them."""

    path: Path
    device: torch.device

    def __getitem__(self, b: int) -> Tensor:
        """`[rows, tokens, hidden]` on the device."""
        with safe_open(self.path, "pt", device=str(self.device)) as file:
            return file.get_tensor(str(b))


class Reference:
    """Of one model, under one protocol, on one kind of machine."""

    def __init__(
        self, store: Store, fingerprint: str, asked: Mapping[str, Any], environment: Mapping[str, Any], states: bool
    ) -> None:
        """`asked` is the evaluation's identity; `states` says whether its readers compare logits."""
        where = {k: environment.get(k) for k in ("device", "dtype", "packages", "gpu", "cpu")}
        self.store, self.with_states = store, states
        self.key = identity("after the last block", fingerprint, dict(asked), where, __version__)
        self.about = {"model": fingerprint, "protocol": str(asked["protocol"])}

    @property
    def path(self) -> Path:
        return self.store.baselines / f"{self.key}-states.safetensors"

    def load(self, device: torch.device) -> tuple[Scores | None, Kept | None]:
        """What is kept, or None for both when the original must be measured.

        Raises RequestError for a file that holds those of another model or text.
        """
        scores = self.store.load_baseline(self.key, self.about)
        if scores is None or not self.with_states:
            return scores, None
        try:
            with safe_open(self.path, "pt") as file:
                require_about(self.path, file.metadata() or {}, self.about)
        except (FileNotFoundError, SafetensorError, OSError):
            return None, None
        return scores, Kept(self.path, device)

    def save(self, scores: Scores, states: States | None) -> None:
        """Keeps them to save work: where there is no room, that is said, and the next pass measures them again."""
        if states is not None and self.with_states:
            log.info("the original's last hidden states are kept for later points: %.1f MB", states.nbytes / 1e6)
            tensors = {str(b): states[b].cpu() for b in range(len(states))}
            if not self.store.save_states(self.path, tensors, self.about):
                return
        self.store.save_baseline(self.key, scores, self.about)
