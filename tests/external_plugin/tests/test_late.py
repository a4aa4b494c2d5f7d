"""The protocol keeps qbench's contracts: the last half of each window is scored, and nothing else."""

import numpy as np
import torch
from qbench_example.late import LateWindows

from qbench.config import RuntimeConfig
from qbench.sources.tiny import build
from qbench.testing import ProtocolConformance


class TestLate(ProtocolConformance):
    protocol = LateWindows
    changing = ({"window": 32}, {"max_windows": 2})
    nonsense = ({"window": 0}, {"max_windows": 0})

    def settings(self):
        return {"name": "text", "window": 64, "max_windows": 3}

    def text(self, folder, seed):
        words = np.random.default_rng(seed).integers(0, 1000, 200)
        (folder / "text.txt").write_text(" ".join(map(str, words)))
        return {"path": str(folder / "text.txt")}


def test_it_scores_the_last_half():
    model, tokenizer = build("dense", 0)
    task = LateWindows(name="mini", window=64, max_windows=3)
    evaluation = task.prepare(task.read(), tokenizer, RuntimeConfig())
    with torch.no_grad():
        baseline = evaluation.score_baseline(model.eval())
        scores = evaluation.score(model, baseline)
    (record,), _, _ = evaluation.records(scores, baseline, False)
    assert record.protocol == "mini:late-w64-first3"
    assert record.scored_tokens == 3 * 32
    assert np.isclose(record.ppl, np.exp(scores["token_nll"][:, 31:].mean()))
    assert record.divergence.kl.value == 0
    assert record.divergence.top1_agreement.value == 1
