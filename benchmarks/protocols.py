"""The same models under every protocol: why perplexities of different papers do not compare. Writes docs' table.

    python benchmarks/protocols.py WIKI_TEST_RAW C4_PAGES_JSON_GZ [OUTPUTS]

Loads the reference model once, scores it under all protocols, quantizes it with RTN and SINQ, and scores it again.
Texts are cut short, which the protocols' names say. Prints one markdown table; progress goes to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qbench.config import RuntimeConfig
from qbench.evaluate.protocol import Protocol
from qbench.evaluate.protocols.crops import PageCrops
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.evaluate.protocols.pages import JoinedPages
from qbench.evaluate.protocols.windows import TextWindows
from qbench.passes.quantize import quantize_model
from qbench.record.quality import EvaluationRecord
from qbench.registry import make_quantizer
from qbench.sources.smollm2 import SmolLM2

METHODS = (("rtn", 4), ("sinq", 4), ("sinq", 3))
MODEL = SmolLM2()


def protocols(wikitext: str, c4: str) -> list[Protocol]:
    cut = {"window": 512, "max_windows": 4}
    return [
        TextWindows(name="mini", **cut),
        TextWindows(name="wikitext2", path=wikitext, separator="\n\n", **cut),
        TextWindows(name="text", path=wikitext, **cut),
        PageCrops(name="c4_gptq", path=c4, **cut),
        JoinedPages(name="c4_new", path=c4, pages=1000, **cut),
        LmEval(name="wikitext_lmeval", names=["wikitext"], path=wikitext, limit=1, window=512),
        LmEval(name="c4_lmeval", names=["c4"], path=c4, limit=3, window=512),
    ]


def main() -> None:
    wikitext, c4, outputs = (*sys.argv[1:], "outputs")[:3]
    runtime = RuntimeConfig()
    tokenizer = MODEL.tokenizer(Path(outputs) / "models")
    evaluations = [task.prepare(task.read(), tokenizer, runtime) for task in protocols(wikitext, c4)]
    model = fresh(outputs)
    baselines = [evaluation.score_baseline(model) for evaluation in evaluations]
    records: list[list[EvaluationRecord]] = []
    for name, nbits in METHODS:
        model = fresh(outputs)
        quantize_model(model, make_quantizer({"name": name, "nbits": nbits}))
        records.append(
            [
                evaluation.records(evaluation.score(model, baseline), baseline, False)[0][0]
                for evaluation, baseline in zip(evaluations, baselines, strict=True)
            ]
        )
    print("| protocol | tokens | 16 bit | " + " | ".join(f"{name.upper()} {nbits}" for name, nbits in METHODS) + " |")
    print("|---|---|---|" + "---|" * len(METHODS))
    for rows in zip(*records, strict=True):
        first = rows[0]
        print(f"| {first.protocol} | {first.scored_tokens} | {first.baseline_ppl:.2f} | {cells(rows)} |")
        for metrics in zip(*(row.metrics for row in rows), strict=True):
            print(f"| &nbsp; {metrics[0].name} | | {metrics[0].baseline:.3f} |", end="")
            print(" | ".join(f" {m.value:.3f}" for m in metrics), "|")
    print("\n| protocol | KL, nats | same top token | RMS change of the true token's probability |\n|---|---|---|---|")
    for (name, nbits), row in zip(METHODS, records, strict=True):
        for record in row[:2]:
            d = record.divergence
            assert d is not None
            kl, same, change = d.kl, d.top1_agreement, d.true_token_rms_change
            print(
                f"| {name.upper()} {nbits}, {record.protocol} | {kl.value:.3f} ({kl.low:.3f} to {kl.high:.3f}) ", end=""
            )
            print(f"| {same.value:.1%} | {change.value:.3f} |")


def fresh(outputs: str) -> torch.nn.Module:
    return MODEL.load(torch.float32, torch.device("cpu"), Path(outputs) / "models").model


def cells(rows: tuple[EvaluationRecord, ...]) -> str:
    return " | ".join(
        f"{r.ppl:.2f} ({r.ppl_delta_low:+.1f} to {r.ppl_delta_high:+.1f})"
        if r.ppl_delta_low is not None
        else f"{r.ppl:.2f}"
        for r in rows
    )


if __name__ == "__main__":
    main()
