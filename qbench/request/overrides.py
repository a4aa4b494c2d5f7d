"""The command line, read before Hydra reads it: what cannot be meant is refused here, in one sentence.

Hydra's grammar stays: `glob(a*)`, `choice(...)`, `range(...)`, sort, shuffle, tag and casts as it has them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, RangeSweep, ValueType
from omegaconf import DictConfig, OmegaConf

from qbench.errors import RequestError, unknown
from qbench.request.options import GROUPS, options

LONGEST_OPTION = 200  # bytes: a longer one is no file's name
MOST_VALUES = 10_000  # of one range(...): more is a slip of the pen


def arguments(argv: Sequence[str]) -> Any:
    """The command line as argparse sees it: `overrides`, `multirun`, `config_dir` and the rest of Hydra's flags.

    Raises RequestError for a flag that there is not, or one that would unpickle a file.
    """
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise RequestError(f"{message}; an override has the form KEY=VALUE, and all of them follow the flags")

    parser.error = refuse
    given = parser.parse_args(list(argv))
    if given.experimental_rerun is not None:
        raise RequestError("--experimental-rerun would unpickle a file; a result's own `command` repeats its point")
    commands = [given.run, given.multirun, given.cfg, given.info, given.shell_completion]
    if sum(bool(command) for command in commands) > 1:
        raise RequestError("only one of --run, --multirun, --cfg, --info and --shell-completion at a time")
    if given.resolve and not (given.cfg or given.help):
        raise RequestError("--resolve goes with --cfg or --help")
    return given


def check(overrides: Iterable[str]) -> None:
    """Raises RequestError for an override that cannot be read, takes something out, or names a group's option by a
    number, a list or nothing."""
    for text in overrides:
        readable = text.encode("utf-8", "backslashreplace").decode()
        if readable != text:
            raise RequestError(f"'{readable}' is not UTF-8 text, which is what a result can record")
        override = parse(text)
        if override.is_delete():
            key = override.key_or_group
            instead = f"choose {key}=OPTION" if key in GROUPS else f"set {key}=VALUE"
            raise RequestError(f"'{text}' would take {key} out, which every point has; {instead} instead")
        if override.value_type == ValueType.INTERVAL_SWEEP:
            raise RequestError(f"'{text}' names no values: a sweep needs a list, choice(...) or range(...)")
        if override.value_type == ValueType.RANGE_SWEEP:
            _check_range(text, override.value())
        if override.value_type == ValueType.GLOB_CHOICE_SWEEP and override.key_or_group not in GROUPS:
            groups = ", ".join(GROUPS)
            raise RequestError(f"'{text}' chooses from a group's options, and these are the groups: {groups}")
        if override.key_or_group in GROUPS:
            _check_option(text, override)
            continue
        group = override.package is not None or "/" in override.key_or_group  # one of Hydra's own
        group |= not override.key_or_group
        if group and not (override.key_or_group and _is_name(override.value())):
            raise RequestError(f"'{text}' chooses no option: a group takes a name, GROUP=OPTION")


def parse(text: str) -> Override:
    """Raises RequestError, with the right quoting if that is what is missing, for what is no override."""
    try:
        return OverridesParser.create().parse_override(text)
    except Exception:  # the parser's and the lexer's own, and those of functions such as int(...)
        message = f"cannot read '{text}'; an override has the form KEY=VALUE or GROUP=OPTION"
        key, _, value = text.partition("=")
        quoted = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
        try:
            OverridesParser.create().parse_override(quoted)
        except Exception:
            raise RequestError(message) from None
        if value:
            message += f"; if the value is meant letter by letter, quote the value: {shlex.quote(quoted)}"
        raise RequestError(message) from None


def leave_to_points(given: Sequence[str]) -> list[str]:
    """The arguments of a sweep, with the settings of groups written so that only the points take them.

    Hydra applies `quantizer.ratios=10` of `quantizer=glob(a*) quantizer.ratios=10` to the default quantizer first,
    which may have no such key; `quantizer.ratios=choice(10)` says the same and reaches the points alone.
    """
    kept = []
    for argument in given:
        if "=" in argument and argument.lstrip("+").partition(".")[0] in GROUPS and not argument.startswith("-"):
            override = parse(argument)
            if "." in override.key_or_group and not override.is_sweep_override():
                argument = f"{override.get_key_element()}=choice({override.get_value_element_as_str()})"
        kept.append(argument)
    return kept


def chosen(overrides: Iterable[str]) -> list[str]:
    """Those of the overrides that select one option of a group."""
    found = []
    for text in overrides:
        try:
            override = parse(text)
        except RequestError:
            continue
        group = override.key_or_group in GROUPS or override.key_or_group.startswith("hydra/")
        if group and not override.is_sweep_override() and isinstance(override.value(), str):
            found.append(text)
    return found


def check_keys(config: DictConfig, prefix: str = "") -> None:
    """Raises RequestError for a key that the schema lacks: `+KEY=VALUE` adds any key, past Hydra's own check."""
    kind = OmegaConf.get_type(config)
    legal = [f.name for f in fields(kind)] if isinstance(kind, type) and is_dataclass(kind) else None
    for key in config:
        if f"{prefix}{key}" == "hydra":  # Hydra's own, and its launchers'
            continue
        if legal is not None and key not in legal:
            raise unknown("key", f"{prefix}{key}", (f"{prefix}{name}" for name in legal))
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if isinstance(child := config[key], DictConfig):
            check_keys(child, f"{prefix}{key}.")


def _check_option(text: str, override: Override) -> None:
    group = override.key_or_group
    if override.package is not None:
        raise RequestError(f"'{text}': a group has one place, so it takes no @PACKAGE; say {group}=OPTION")
    if override.value_type == ValueType.RANGE_SWEEP:
        raise _no_option(group, text.partition("=")[2])
    for option in _elements(override):
        if isinstance(option, QuotedString):
            option = option.text
        if not _is_name(option):
            swept = override.is_sweep_override()
            raise _no_option(group, (str(option) if swept else override.get_value_element_as_str())[:LONGEST_OPTION])


def _is_name(option: Any) -> bool:
    """Whether it could be the name of a file, which is looked for: a system refuses longer ones with an error."""
    return isinstance(option, str) and 0 < len(option.encode("utf-8", "surrogatepass")) <= LONGEST_OPTION


def _no_option(group: str, given: str) -> RequestError:
    return unknown(group, given, options(group))


def _elements(override: Override) -> Iterator[Any]:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        yield from value.list
    elif not isinstance(value, Glob):
        yield value


def _check_range(text: str, sweep: Any) -> None:
    assert isinstance(sweep, RangeSweep)
    try:
        count = sum(1 for _, _ in zip(sweep.range(), range(MOST_VALUES + 1), strict=False))
    except (ValueError, TypeError, ArithmeticError):  # what decimal says of nan is no sentence
        raise RequestError(f"'{text}' is no range: say range(START,STOP,STEP), with finite numbers") from None
    if not 0 < count <= MOST_VALUES:
        many = "no value" if not count else f"more than {MOST_VALUES} values"
        raise RequestError(f"'{text}' has {many}; range(START,STOP,STEP) ends before STOP")
