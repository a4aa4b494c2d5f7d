"""What qbench uses of other packages though it is private there: listed in docs/architecture.md, and nothing else."""

import ast
import re
from functools import cache
from importlib.metadata import version

from tests.conftest import ROOT

NAME = re.compile(r"_[a-zA-Z][a-zA-Z_]*")
READ_AT = {"torch": "2.13", "lm-eval": "0.4.13", "transformers": "5."}
PUBLIC = {"_exit", "_target_"}  # of os, and a key of Hydra's


@cache
def trees():
    files = [path for folder in ("qbench", "plugins", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def defined(tree):
    """Names of its own: functions, classes, parameters, fields, and whatever is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def used(tree):
    """Private names that are reached for: attributes, imports, and strings by which an attribute is asked for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("qbench"):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and called(node) in ("getattr", "hasattr", "pop"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str))
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and called(node.value) == "vars":
            yield getattr(node.slice, "value", "")


def called(call):
    return getattr(call.func, "id", getattr(call.func, "attr", None))


def test_every_private_name_of_another_package_is_in_the_table():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Private to other packages")[2].splitlines() if line.startswith("| ")]
    listed = {
        (name, path) for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[2]) for path in paths(row)
    }
    own = {name for tree in trees().values() for name in defined(tree)}
    found = {
        (name, path)
        for path, tree in trees().items()
        for name in used(tree)
        if NAME.fullmatch(name) and name not in own and "__" not in name and name not in PUBLIC
    }
    assert found == listed


def paths(row):
    return re.findall(r"[a-z_0-9/]+\.py", row.split("|")[3])


def test_they_are_of_the_versions_that_were_read():
    """After an upgrade: look at each name of the table again, then write the new version here."""
    assert not [package for package, read in READ_AT.items() if not version(package).startswith(read)]
