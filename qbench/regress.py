"""`python -m qbench.regress GATE_FILE [OUTPUTS]`: the gate for CI.

Compares every point of the committed GATE_FILE with what is recorded in OUTPUTS, prints a Markdown summary (also to
$GITHUB_STEP_SUMMARY, if that is set) and, with --junit FILE, JUnit XML. Exit status: 0 pass; 1 something regressed or a
point failed; 2 wrong input, or points are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qbench.entry import leave
from qbench.errors import RequestError
from qbench.record.store import write_atomically
from qbench.report import entries
from qbench.report.gate import verdict
from qbench.report.gate.compare import Finding, compare
from qbench.report.gate.file import GateFile, GatePoint, Limits, label
from qbench.report.table import plain

PASS, REGRESSED, WRONG = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the gate, or writes the gate file, and returns the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        recorded = entries.read(asked.outputs)
        for problem in recorded.problems:
            _say(problem)
        return _update(asked, recorded) if asked.update else _gate(asked, recorded)
    except RequestError as error:
        _say(str(error))
        return WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qbench.regress", description="Did anything get worse?")
    parser.add_argument("gate_file", type=Path, metavar="GATE_FILE", help="the committed JSON file")
    parser.add_argument(
        "outputs", nargs="?", default="outputs", type=Path, help="the outputs folder of `python -m qbench`"
    )
    parser.add_argument(
        "--update", action="store_true", help="write the gate file from what is recorded; limits are kept"
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="only points with this setting"
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the outcome as JUnit XML")
    return parser


def _gate(asked: argparse.Namespace, recorded: entries.Recorded) -> int:
    gate_file = GateFile.read(asked.gate_file)
    points = entries.where(gate_file.points, asked.where)
    if not points:
        raise RequestError(f"{asked.gate_file} holds no points; write some with --update")
    findings = compare(GateFile(points, gate_file.limits), recorded)
    if asked.where:  # what is outside of the selection is not news
        findings = [f for f in findings if f.verdict != "note" or f.check != "point"]
    summary = verdict.markdown(findings)
    print(summary, end="")
    _write(asked.junit, verdict.junit(findings))
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(target, "a", encoding="utf-8") as file:
                file.write(summary + "\n")
        except OSError as error:
            _say(f"cannot write the summary to $GITHUB_STEP_SUMMARY: {error.strerror}")
    return _status(findings)


def _status(findings: list[Finding]) -> int:
    verdicts = {finding.verdict for finding in findings}
    if verdicts & {"regressed", "failed"}:
        return REGRESSED
    return WRONG if "missing" in verdicts else PASS


def _update(asked: argparse.Namespace, recorded: entries.Recorded) -> int:
    limits, known = _old(asked)
    if failures := entries.unresolved(recorded):
        raise RequestError(f"no gate file from failed points: {' '.join(failures[0].command)}: {failures[0].error}")
    chosen = entries.latest(entries.where(recorded.entries, asked.where))
    if not chosen:
        raise RequestError(f"{asked.outputs} holds no finished point to make a gate file from")
    for entry in chosen:
        name = label(entry.result.command)
        without = [score for score in entry.scores if score.windows is None]
        if len(without) == len(entry.scores):
            raise RequestError(f"{name} has no scores per window or document to compare; measure it again")
        for score in without:
            _say(f"{name}: {score.metric} under {score.protocol} has no values per document, so it is left out")
    new = GateFile.of(chosen, limits)
    if asked.where:
        measured = {point.identity.key for point in new.points}
        new = GateFile.ordered([*new.points, *(p for p in known if p.identity.key not in measured)], limits)
    kept = {point.identity.key for point in new.points}
    for point in known:
        if point.identity.key not in kept:
            _say(f"no longer in the gate file, since it was not measured: {point.label}")
    _write(asked.gate_file, new.to_json())
    _say(f"{len(new.points)} points written to {asked.gate_file}")
    return PASS


def _old(asked: argparse.Namespace) -> tuple[Limits, list[GatePoint]]:
    """The limits and points of the gate file that --update writes; of one that cannot be read, only limits."""
    if not asked.gate_file.exists():
        return Limits(), []
    try:
        old = GateFile.read(asked.gate_file)
    except RequestError as error:
        if asked.where:
            raise RequestError(f"{error}; without --where") from None
        limits = GateFile.read_limits(asked.gate_file)
        _say(f"{error}: only its limits are kept")
        return limits, []
    return old.limits, old.points


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def _say(message: str) -> None:
    print(f"qbench.regress: {plain(message, 500)}", file=sys.stderr)


if __name__ == "__main__":
    leave(main, closed_pipe=128 + 13)
