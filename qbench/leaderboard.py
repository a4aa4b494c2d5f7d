"""`python -m qbench.leaderboard [OUTPUTS]`: the table of everything recorded, in one of six formats.

One row per identity (the latest record of each), one section per original model, protocol and text; what was measured
part by part (experiment=anatomy) is a table for each method. Files that cannot be read are named on stderr and left
out. Exit status: 0 done, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import gc
import io
import sys
from pathlib import Path

from qbench.entry import leave
from qbench.errors import RequestError, unknown
from qbench.record.outline import Outline
from qbench.record.result import Result
from qbench.report import anatomy, board, columns, entries, history, published, table
from qbench.report.terminal import width

FORMATS = ("table", "md", "csv", "json", "tex", "html")
SUFFIXES = {".md": "md", ".csv": "csv", ".json": "json", ".tex": "tex", ".html": "html", ".htm": "html"}


def main(arguments: list[str] | None = None) -> int:
    """Writes the leaderboard that the command line asks for and returns the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        text = _report(asked)
        _deliver(text, asked.output)
    except RequestError as error:
        print(f"qbench.leaderboard: {table.plain(str(error), 500)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qbench.leaderboard", description="What was recorded, side by side."
    )
    parser.add_argument(
        "outputs", nargs="?", default="outputs", type=Path, help="the outputs folder of `python -m qbench`"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of -o, else table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there instead of stdout")
    parser.add_argument("--metric", default="quality", help=f"what to sort by: {', '.join(columns.SORTABLE)}")
    parser.add_argument("--protocol", help="only this protocol, such as mini:gptq-w512")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only rows with this setting")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="NAME", help="published numbers beside ours"
    )
    parser.add_argument(
        "--history", action="store_true", help="every record of each measurement, over versions and dates"
    )
    return parser


def _report(asked: argparse.Namespace) -> str:
    style = asked.format or SUFFIXES.get(asked.output.suffix if asked.output else "", "table")
    if asked.metric not in columns.SORTABLE:
        raise unknown("metric", asked.metric, columns.SORTABLE)
    numbers = [number for name in asked.reference for number in published.read(name)]
    recorded = entries.read(asked.outputs, kind=Result if style == "html" else Outline)  # the page draws every layer
    for problem in recorded.problems:
        print(f"qbench.leaderboard: {table.plain(problem, 500)}", file=sys.stderr)
    kept = entries.where(recorded.entries, asked.where)
    if asked.protocol is not None:
        kept = entries.under(kept, asked.protocol)
    if asked.history:
        if style == "html" or numbers:
            raise RequestError("--history has no HTML page and takes no --reference; use table, md, csv, json or tex")
        tables = history.tables(kept, asked.metric)
    else:
        parts, kept = anatomy.split(kept)
        anatomies = anatomy.anatomies(parts, asked.outputs)
        order, descending = columns.order(asked.metric)
        sections = board.sections(entries.latest(kept), order, descending)
        failed = entries.unresolved(recorded)
        if style == "html":
            from qbench.report import html

            return html.page(sections, failed, recorded.problems, numbers, anatomies)
        tables = [columns.table(section, numbers) for section in sections]
        tables += [anatomy.table(one) for one in anatomies]
        for result in failed:
            name, reason = table.plain(" ".join(result.command), 300), table.plain(result.error or "", 300)
            print(f"qbench.leaderboard: failed point {name}: {reason}", file=sys.stderr)
    return table.write(tables, style, None if asked.output else width(sys.stdout))


def _deliver(text: str, output: Path | None) -> None:
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a console of another encoding would refuse the marks
            sys.stdout.reconfigure(errors="replace")
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    from qbench.record.store import write_atomically

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text.encode("utf-8", "replace"))
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error.strerror}") from None
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    gc.disable()  # a thousand results are millions of objects, and none of them is garbage before the end
    leave(main)
