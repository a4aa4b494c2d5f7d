"""`python -m qbench.catalog`: the models, quantizers and tasks this installation can run, what each needs, and how this
machine multiplies packed weights.
"""

from __future__ import annotations

import argparse
import sys

from qbench import entry
from qbench.registry import EXPORTER, READER, names, quantizer_names
from qbench.request.options import GROUPS, options


def main(arguments: list[str] | None = None) -> int:
    lists = "The models, quantizers and tasks that can be run here, all of them."
    argparse.ArgumentParser(prog="python -m qbench.catalog", description=lists).parse_args(arguments)
    from rich.console import Console  # here: the command line asks this module for options, and prints no tables
    from rich.table import Table

    class Shown(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1; `| head` has seen enough

    console = Shown(width=None if sys.stdout.isatty() else 160)
    registered = set(quantizer_names())
    for group in GROUPS:
        table = Table(title=f"{group}=", title_justify="left", show_header=False, box=None)
        for name, about in options(group).items():
            if group == "quantizer" and name not in registered:
                about = f"(configured, but no package registers it) {about}"
            table.add_row(name, about)
        console.print(table)
    console.print(f"quantizer=file reads: {', '.join(names(READER))}", markup=False)
    console.print(f"export.format= writes: {', '.join(names(EXPORTER))}", markup=False)
    from qbench.request.device import path_here  # last: it imports torch, and on a GPU compiles the kernels

    console.print(path_here(), markup=False)
    return 0


if __name__ == "__main__":
    entry.leave(main)
