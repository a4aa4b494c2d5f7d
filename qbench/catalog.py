"""`python -m qbench.catalog`: the models, quantizers and tasks this installation can run, and what each needs."""

from __future__ import annotations

import sys
from importlib import resources
from importlib.resources.abc import Traversable

from qbench import entry
from qbench.registry import conf_packages, quantizer_names

GROUPS = ("model", "quantizer", "task", "calibration", "runtime", "speed", "tracker", "experiment")


def options(group: str) -> dict[str, str]:
    """Option -> the first comment line of its YAML, for ours and for third parties' packages."""
    found = {}
    for package in ("qbench.conf", *conf_packages()):
        folder = resources.files(package) / group
        if folder.is_dir():
            found |= _described(folder)
    return dict(sorted(found.items()))


def _described(folder: Traversable, prefix: str = "") -> dict[str, str]:
    """The options of a folder; one in a folder below it is called FOLDER/OPTION, as Hydra does."""
    found = {}
    for file in folder.iterdir():
        if file.is_dir():
            found |= _described(file, f"{prefix}{file.name}/")
        elif file.name.endswith(".yaml"):
            found[prefix + file.name.removesuffix(".yaml")] = _first_comment(file)
    return found


def _first_comment(file: Traversable) -> str:
    """Of the lines that begin the file; `# @package` is an instruction to Hydra."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            return ""
        if (text := line.lstrip("# ").rstrip()) and not text.startswith("@package"):
            return text
    return ""


def main() -> int:
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
    return 0


if __name__ == "__main__":
    entry.leave(main)
