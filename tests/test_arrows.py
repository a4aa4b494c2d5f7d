"""What holds the house together: no import runs upward, folders say what they hold, files end.

MAY is the rule; the table in docs/architecture.md is made from it. Every import counts, also one inside a function or
under TYPE_CHECKING: who needs another's type depends on it. EXCEPTIONS lists what breaks the rule, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

GROUND = (  # modules in the root that know no folder
    "config",
    "errors",
    "registry",
    "values",
    "intervals",
    "significance",
    "entry",
    "checkout",
)
COMMANDS = ("__main__", "leaderboard", "regress", "catalog")

# Folder, or module of the root -> folders that it may import besides the ground, from the top of the house down.
MAY: dict[str, tuple[str, ...]] = {
    "commands": ("run", "sweep", "request", "report", "track", "record"),
    "testing": (
        *("run", "request", "passes", "evaluate", "sources", "readers", "checkpoint", "transforms", "model", "layers"),
        *("quant", "format", "track", "record"),
    ),
    "run": (
        *(
            "sweep",
            "request",
            "passes",
            "evaluate",
            "sources",
            "readers",
            "checkpoint",
            "transforms",
            "model",
            "layers",
        ),
        *("quant", "format", "report", "track", "record"),
    ),
    "sweep": ("request", "passes", "evaluate", "sources", "checkpoint", "report", "track", "record"),
    "request": (
        *("passes", "evaluate", "sources", "readers", "parts", "checkpoint", "transforms", "model", "layers", "quant"),
        *("format", "track", "record"),
    ),
    "passes": (
        *("evaluate", "sources", "checkpoint", "transforms", "model", "layers", "quant", "kernels", "format", "record"),
    ),
    "evaluate": ("texts", "sources", "checkpoint", "model", "layers", "quant", "kernels", "format", "record"),
    "sources": ("readers", "checkpoint", "model", "layers", "quant", "format", "record"),
    "readers": ("checkpoint", "model", "layers", "quant", "format", "record"),
    "parts": ("model", "layers", "quant", "format", "record"),
    "checkpoint": ("model", "layers", "quant", "format", "record"),
    "transforms": ("model", "layers", "quant", "format"),
    "model": ("layers", "quant", "format"),
    "plugins": ("quant", "kernels", "format"),
    "layers": ("quant", "kernels", "format"),
    "quant": ("kernels", "format"),
    "kernels": ("format",),
    "format": (),
    "texts": (),
    "report": ("record",),
    "track": ("record",),
    "record": (),
    "ground": (),
}
ONLY_ERRORS = ("plugins", "layers", "quant", "kernels", "format")  # of the ground: they know no configuration
# Of others' packages, the large ones are imported by these alone.
OTHERS: dict[str, tuple[str, ...]] = {
    "hydra": ("commands", "sweep", "request", "config"),
    "omegaconf": ("commands", "sweep", "request", "config"),
    "lm_eval": ("evaluate",),
    "wandb": ("track",),
    "pytest": ("testing",),
}


class Import(NamedTuple):
    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


# (file, module) -> reason. An entry that nothing needs any longer fails, so that the list only gets shorter.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("qbench/format/mixed.py", "qbench.registry"): "the formats that a stack is mixed of are found by their names",
    ("qbench/registry.py", "qbench.quant.quantizer"): "for the type checker: `make_quantizer` says what it returns",
}


def room(path: Path) -> str:
    """The row of MAY that a file belongs to."""
    first, *below = path.relative_to(ROOT).parts
    name = first if first == "plugins" else below[0].removesuffix(".py")
    return owner(name) if name != "__init__" else "ground"


def owner(name: str) -> str:
    if name in GROUND:
        return "ground"
    return "commands" if name in COMMANDS else name


def files() -> list[Path]:
    return [p for folder in ("qbench", "plugins") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; `from qbench.sources import load` is one of qbench.sources.load if that is a module."""
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(name, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: say the whole name, not one with dots in front"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(name, node.lineno, inner if is_module(inner) else str(node.module))


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def wrong(path: Path, found: Import) -> bool:
    here, (top, *below) = room(path), found.module.split(".")
    if top in OTHERS:
        return here not in OTHERS[top] and path.stem not in OTHERS[top]
    if top != "qbench" or not below:
        return False
    if below[0] in GROUND:
        return here in ONLY_ERRORS and below[0] != "errors"
    there = owner(below[0])
    return there != here and there not in MAY[here]


def test_no_import_runs_upward():
    bad = [(path, found) for path in files() for found in set(imports(path)) if wrong(path, found)]
    told = sorted(
        f"{found}: {room(path)} may import {', '.join(MAY[room(path)]) or 'none of our folders'}"
        for path, found in bad
        if (found.file, found.module) not in EXCEPTIONS
    )
    assert not told, "\n" + "\n".join(told)
    needed = {(found.file, found.module) for _, found in bad}
    kept = [f"{file} no longer imports {module}: take it out of EXCEPTIONS" for file, module in {*EXCEPTIONS} - needed]
    assert not kept, "\n" + "\n".join(sorted(kept))


def test_the_rule_itself_has_no_circle():
    """Every folder may import only what stands below it in MAY, so that no chain of allowed imports leads back."""
    order = list(MAY)
    up = [f"{a} -> {b}" for a in MAY for b in MAY[a] if order.index(b) <= order.index(a)]
    assert not up
    assert {room(path) for path in files()} <= set(MAY)


@pytest.mark.parametrize("kind", ["import", "from", "inside a function", "for the type checker", "an outsider's"])
def test_a_bad_import_is_named_with_its_file_and_line(kind):
    code = {
        "import": "import qbench.evaluate.score\n",
        "from": "from qbench.evaluate import score\n",
        "inside a function": "def f():\n    from qbench.evaluate.score import nlls\n",
        "for the type checker": "if TYPE_CHECKING:\n    from qbench.evaluate.score import nlls\n",
        "an outsider's": "import hydra\n",
    }[kind]
    path = ROOT / "qbench" / "format" / "zz_probe.py"
    probe = type("Probe", (), {"read_text": lambda self, encoding: code, "relative_to": path.relative_to})()
    (found,) = [i for i in imports(probe) if i.module != "typing"]
    assert wrong(path, found)
    assert str(found).startswith(f"qbench/format/zz_probe.py:{1 + code.count(chr(10) + ' ')} imports ")


def test_the_root_holds_at_most_twelve_modules():
    names = sorted(p.stem for p in (ROOT / "qbench").glob("*.py") if p.stem != "__init__")
    assert len(names) <= 12, names
    assert set(names) <= {*GROUND, *COMMANDS, "run", "testing"}, "say in MAY where it stands"


def test_every_folder_opens_with_a_sentence_or_two_about_what_it_holds():
    for folder in sorted({path.parent for path in files()}):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        opening = said.partition("\n\n")[0]
        assert 1 <= len(re.findall(r"[.!?](?=\s|$)", opening)) <= 2, f"{folder.relative_to(ROOT)}: {opening!r}"


def test_files_end():
    sources = files() + sorted((ROOT / "qbench").rglob("*.cu*"))
    long = [(p, n) for p in sources if (n := len(p.read_text(encoding="utf-8").splitlines())) > 340]
    assert not long, "\n".join(f"{p.relative_to(ROOT)} has {n} lines: split it by idea" for p, n in long)


def test_the_page_shows_the_rule():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert table() in page, f"docs/architecture.md, `Who may import whom`, must hold:\n{table()}"


def table() -> str:
    """MAY and OTHERS as the page shows them."""
    rows = ["| from | may import | and of others' packages |", "|---|---|---|"]
    for name, below in MAY.items():
        others = [top for top, who in OTHERS.items() if name in who]
        names = {"commands": COMMANDS, "ground": GROUND}.get(name)
        said = ", ".join(f"`{n}.py`" for n in names) if names else f"`{name}/`"
        rows.append(f"| {said} | {', '.join(below)} | {', '.join(f'`{o}`' for o in others)} |")
    return "\n".join(rows)
