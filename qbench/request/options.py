"""The options of each group of the configuration, ours and those of third parties' packages, with what each is."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from qbench.registry import conf_packages

GROUPS = ("model", "quantizer", "transform", "task", "calibration", "runtime", "speed", "tracker", "experiment")


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
