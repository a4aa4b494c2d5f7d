"""Turns what Hydra says about a wrong command line into one sentence that lists the legal choices."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from qbench.catalog import GROUPS, options
from qbench.errors import RequestError, unknown
from qbench.registry import conf_packages
from qbench.request import overrides as command_line


class ThirdPartyConf(SearchPathPlugin):
    """Makes the YAML of installed third-party packages selectable by group name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in conf_packages():
            search_path.append(provider="qbench.conf", path=f"pkg://{package}")


def add_third_party_conf() -> None:
    Plugins.instance().register(ThirdPartyConf)


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence for an error of Hydra, OmegaConf or YAML about these `overrides` of the command line."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be set: {error.full_key}=VALUE"
    if isinstance(error, YAMLError):
        return about_yaml(error)
    if isinstance(error, UnicodeDecodeError):
        return f"a YAML file is not UTF-8 text (byte {error.start}): save it as UTF-8"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.partition("/")
        if group in GROUPS:
            return str(unknown(group, option, options(group)))  # Hydra's own list lacks those in folders below
        group, _, option = error.missing_cfg_file.rpartition("/")
        more = "; others come with: pip install 'qbench-llm[launchers]'" if group == "hydra/launcher" else ""
        return f"{unknown(group, option, error.options)}{more}"
    text = str(error)
    if isinstance(error, OverrideParseException):
        try:
            command_line.parse(error.override)
        except RequestError as refusal:
            return str(refusal)
    # only a key that is not in the schema; a value of the wrong type is said by OmegaConf itself below
    if found := re.search(r"Could not override '([^']+)'\.?", text):
        key = found.group(1)
        if key not in (keys := legal_keys(overrides)):
            return str(unknown("key", key, _nearest(key, keys)))
    cause = error.__cause__ or error.__context__
    lines = [line.strip() for line in f"{text}\n{cause or ''}".splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
    return ": ".join(dict.fromkeys(kept[:2])).replace("::", ":")


def about_yaml(error: YAMLError) -> str:
    """One sentence for a file that is no YAML, with the line and column if the parser knows them."""
    mark = getattr(error, "problem_mark", None)
    place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a YAML file"
    return f"{place}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"


def legal_keys(overrides: Sequence[str]) -> list[str]:
    """Every key the command line may set, for the groups that these overrides select."""
    state = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("qbench.conf", version_base="1.3"):
            try:
                composed = compose("config", overrides=command_line.chosen(overrides))
            except (HydraException, OmegaConfBaseException):  # they choose what --config-dir brings, or what is wrong
                composed = compose("config")
    finally:
        Singleton.set_state(state)
    return [*GROUPS, *_flatten(composed)]


def _nearest(key: str, keys: list[str]) -> list[str]:
    """The keys of the same group, or the top-level ones: nobody reads sixty choices."""
    group = key.partition(".")[0]
    same = [k for k in keys if k.startswith(f"{group}.")] if "." in key else []
    return same or [k for k in keys if "." not in k]


def _flatten(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        child = config._get_node(key)
        if isinstance(child, DictConfig):
            keys += _flatten(child, f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys
