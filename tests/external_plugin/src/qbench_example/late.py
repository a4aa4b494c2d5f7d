"""`task.protocol=late`: windows as usual, of which the last half is scored, so that every scored token has context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qbench.config import RuntimeConfig
from qbench.evaluate.protocol import Scores
from qbench.evaluate.protocols.windows import TextWindows
from qbench.evaluate.windowed import WindowedEvaluation


@dataclass(frozen=True, kw_only=True)
class LateWindows(TextWindows):
    def protocol_name(self, text: str) -> str:
        return f"{text}:late-{self.size_in_name}"

    def prepare(self, source: Any, tokenizer: Any, runtime: RuntimeConfig) -> LateEvaluation:
        return LateEvaluation(self.cut(source, tokenizer), source, self, runtime)


class LateEvaluation(WindowedEvaluation):
    """Scores whole windows, and records the last half of each."""

    def records(self, scores: Scores, baseline: Scores | None, baseline_cached: bool) -> Any:
        late = _last_half(scores)
        found, tasks, kept = super().records(late, baseline and _last_half(baseline), baseline_cached)
        return [replace(record, scored_tokens=late["token_nll"].size) for record in found], tasks, kept


def _last_half(scores: Scores) -> Scores:
    """Of arrays `[windows, tokens, ...]`."""
    return {name: values[:, values.shape[1] // 2 :] for name, values in scores.items()}
