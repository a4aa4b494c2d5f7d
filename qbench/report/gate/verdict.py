"""How the gate's findings are told: Markdown for people and pull requests, JUnit XML for CI systems."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from qbench.report.gate.compare import Finding
from qbench.report.table import markdown_text, plain

BAD = ("regressed", "failed", "missing")


def markdown(findings: Sequence[Finding]) -> str:
    """What is wrong first, then the notes, then one line for each point."""
    bad = [finding for finding in findings if finding.verdict in BAD]
    notes = [finding for finding in findings if finding.verdict == "note"]
    points = dict.fromkeys(finding.point for finding in findings)
    broken = {finding.point for finding in bad}
    lines = [f"## qbench gate: {'failed' if bad else 'passed'}", ""]
    lines += [f"{len(findings)} checks of {len(points)} points, {len(bad)} bad."]
    for title, some in (("Regressions", bad), ("Notes", notes)):
        if some:
            rows = [f"| {_md(f.point)} | {_md(f.check)} | {f.verdict} | {_md(f.message)} |" for f in some]
            lines += ["", f"### {title}", "", "| point | check | verdict | what |", "| --- | --- | --- | --- |", *rows]
    lines += ["", "### Points", "", "| point | verdict | quality |", "| --- | --- | --- |"]
    for point in points:
        # a quality's check is named `metric, protocol`, and no other check has a comma
        quality = [f"{f.check}: {f.message}" for f in findings if f.point == point and ", " in f.check]
        lines.append(f"| {_md(point)} | {'bad' if point in broken else 'ok'} | {_md('; '.join(quality))} |")
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    return markdown_text(text, 400)


def junit(findings: Sequence[Finding]) -> str:
    """One test case per check: regressed and failed ones are failures, missing ones errors."""
    counted = {
        "tests": str(len(findings)),
        "failures": str(sum(f.verdict in ("regressed", "failed") for f in findings)),
        "errors": str(sum(f.verdict == "missing" for f in findings)),
    }
    suite = ET.Element("testsuite", name="qbench.regress", **counted)
    for finding in findings:
        case = ET.SubElement(suite, "testcase", classname=plain(finding.point, 200), name=plain(finding.check, 200))
        message = plain(finding.message, 1000)
        if finding.verdict == "missing":
            ET.SubElement(case, "error", message=message, type=finding.verdict)
        elif finding.verdict in BAD:
            ET.SubElement(case, "failure", message=message, type=finding.verdict)
        else:
            ET.SubElement(case, "system-out").text = message
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
