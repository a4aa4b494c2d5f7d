"""What a point asks of its protocol besides the protocol's own steps: to read once, and to score the original once."""

from __future__ import annotations

from typing import Any

from qbench import __version__
from qbench.evaluate.protocol import Corpus, Evaluation, Protocol, Scores
from qbench.record.store import Store, identity


def read(protocol: Protocol) -> Corpus:
    """What the protocol scores; a function of the settings, so that a sweep reads each text once."""
    return protocol.read()


def baseline(
    evaluation: Evaluation, model: Any, fingerprint: str, environment: dict[str, Any], store: Store
) -> tuple[Scores, bool]:
    """The unquantized model's scores, and whether they were at hand: the same model, protocol and machine share them.

    Those of a pass are others: in the last bits, and in what is kept for a divergence.

    Raises RequestError when the file kept for this model holds another one's.
    """
    where = {k: environment.get(k) for k in ("device", "dtype", "packages", "gpu", "cpu")}
    key = identity(fingerprint, evaluation.identity, where, __version__, "resident")
    about = {"model": fingerprint, "protocol": str(evaluation.identity["protocol"])}
    with store.lock(f"baseline-{key}", "the reference"):
        scores = store.load_baseline(key, about)
        if scores is not None:
            return scores, True
        scores = evaluation.score_baseline(model)
        store.save_baseline(key, scores, about)
    return scores, False
