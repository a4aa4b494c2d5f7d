"""The documents: every link leads somewhere, every page is linked, and every command in the README composes."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qbench.config import Config
from qbench.registry import KINDS
from qbench.request.hubnames import spelled_out
from tests.conftest import composed

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
EXAMPLE = ROOT / "tests" / "external_plugin"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTIONS = {"--help", "--dry-run", "-m", "--multirun"}


def links(page: Path) -> list[Path]:
    """The files that the page's relative links name."""
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
    return [page.parent / target for target in targets if target and "://" not in target]


def commands() -> list[str]:
    """Every `python -m qbench...` in the README's code blocks and tables, as written."""
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^python -m qbench.*$|(?<=`)python -m qbench[^`]*(?=`)", text, flags=re.MULTILINE)
    return list(dict.fromkeys(line.split("  #")[0].split("   ")[0].strip() for line in found))


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    assert [str(target) for target in links(page) if not target.exists()] == []


def test_the_readme_leads_to_every_page():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            waiting += [target for target in links(page) if target.exists()]
    assert [str(page) for page in PAGES if page.resolve() not in seen] == []


def squeezed(text: str) -> str:
    """Without indentation and empty lines, which a block of a page has in its own way."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def test_every_block_of_the_recipes_is_cut_from_the_example():
    """And every file that a recipe names is there, for each of the kinds."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    kept = [p for p in EXAMPLE.rglob("*") if p.suffix in (".py", ".yaml", ".toml", ".md")]
    files = {path: squeezed(path.read_text(encoding="utf-8")) for path in kept}
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        assert any(squeezed(block) in text for text in files.values()), f"in no file of the example:\n{block}"
    recipes = re.findall(r"^Files: (.*)", page, flags=re.MULTILINE)
    assert len(recipes) == len(KINDS)
    for name in re.findall(r"`([\w/]+\.(?:py|yaml))`", " ".join(recipes)):
        assert any(path.match(name) for path in files), name
    for kind in KINDS:
        assert f"`{kind.group}`" in page


def test_the_readme_has_commands_to_check():
    assert "python -m qbench model=tiny-dense" in commands()
    assert len(commands()) > 10


def test_every_point_that_the_readme_asks_for_composes():
    """A key, group or option that is not there raises; values that are files or repositories are not looked for."""
    for command in commands():
        module, *arguments = shlex.split(command, comments=True)[2:]
        assert importlib.util.find_spec(module), command
        if module == "qbench":
            for overrides in points([argument for argument in arguments if argument not in OPTIONS]):
                assert isinstance(composed(spelled_out(overrides)), Config), command


def points(arguments: list[str]) -> list[list[str]]:
    """The overrides of every point of a command line, swept or not."""
    choices = []
    for argument, override in zip(arguments, OverridesParser.create().parse_overrides(arguments), strict=True):
        key, _, value = argument.partition("=")
        values = override.sweep_string_iterator() if override.is_sweep_override() else [value]
        choices.append([f"{key}={one}" for one in values])
    return [list(chosen) for chosen in itertools.product(*choices)]
