"""An experiment's YAML, read before Hydra reads it, so that what is wrong in it is said with its file and line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from qbench.config import Config
from qbench.errors import RequestError, inside, unknown
from qbench.registry import conf_packages
from qbench.request.explain import about_yaml
from qbench.request.overrides import parse

HEADER = "# @package _global_"
SWEEPER = ("params", "also", "dry_run")


def check(overrides: Iterable[str], config_dir: str | None) -> None:
    """Raises RequestError for an experiment among the `overrides` whose file is not of the form of docs/sweeps.md."""
    for text in overrides:
        override = parse(text)
        if override.key_or_group != "experiment" or not isinstance(name := override.value(), str):
            continue
        for folder in _folders(config_dir):  # the first one that has it is Hydra's
            try:
                file = folder.joinpath("experiment", f"{name}.yaml")
                found = file.is_file()
            except (OSError, ValueError):  # a name that no file can have
                break
            if found:
                _check_file(file, name)
                break


def _folders(config_dir: str | None) -> Iterator[Traversable]:
    if config_dir is not None:
        yield Path(config_dir)
    for package in ("qbench.conf", *conf_packages()):
        yield resources.files(package)


def _check_file(file: Traversable, name: str) -> None:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from None
    if content.startswith(b"\xef\xbb\xbf"):
        raise RequestError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(about_yaml(error).replace("<unicode string>", str(file))) from None
    if settings is None:
        raise RequestError(f"{file} is empty: an experiment has a sweep below hydra.sweeper, see docs/sweeps.md")
    if not isinstance(settings, Mapping):
        raise RequestError(f"{file} holds a {type(settings).__name__}, and an experiment is a mapping of settings")
    legal = ("defaults", "hydra", *(f.name for f in fields(Config)))
    for key in settings:
        if key not in legal:
            raise inside(file, unknown("key", str(key), legal))
    if HEADER not in text.splitlines():
        raise RequestError(f"{file}: its first line must be '{HEADER}', or its settings lie below 'experiment'")
    if not isinstance(settings.get("defaults", []), list):
        raise RequestError(f"{file}: defaults must be a list, such as [override /model: tiny-dense]")
    _check_sweeper(file, settings)


def _check_sweeper(file: Traversable, settings: Mapping[str, Any]) -> None:
    hydra = _mapping(file, "hydra", settings.get("hydra"))
    sweeper = _mapping(file, "hydra.sweeper", hydra.get("sweeper"))
    for key in sweeper:
        if key not in SWEEPER:
            choices = (f"hydra.sweeper.{choice}" for choice in SWEEPER)
            raise inside(file, unknown("key", f"hydra.sweeper.{key}", choices))
    also = sweeper.get("also") or []
    if not isinstance(also, list):
        raise RequestError(f"{file}: hydra.sweeper.also must be a list of products, each a mapping of KEY: VALUES")
    for place, product in (("hydra.sweeper.params", sweeper.get("params")), *(("hydra.sweeper.also", p) for p in also)):
        for key, value in _mapping(file, place, product).items():
            try:
                override = parse(assignment(key, value))
            except RequestError as error:
                raise inside(f"{file}, {place}", error) from None
            if override.key_or_group == "experiment":
                raise RequestError(f"{file}, {place}: an experiment cannot choose an experiment")


def assignment(key: Any, value: Any) -> str:
    """An entry of a product as an override of the command line: `quantizer.nbits: 4,3` is `quantizer.nbits=4,3`."""
    return f"{key}={'null' if value is None else value}"


def _mapping(file: Traversable, place: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{file}: {place} must be a mapping, got {type(value).__name__}")
    return value
