"""Turns what Hydra says about a wrong command line into one sentence that lists the legal choices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from qbench.errors import RequestError, unknown
from qbench.registry import conf_packages
from qbench.request import overrides as command_line
from qbench.request.options import GROUPS, options

OPTIONS_OF_HYDRA = ("hydra.sweeper", "hydra.launcher")  # their keys are those of the option that is chosen


class ThirdPartyConf(SearchPathPlugin):
    """Makes the YAML of installed third-party packages selectable by group name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in conf_packages():
            search_path.append(provider="qbench.conf", path=f"pkg://{package}")


def register_plugins() -> None:
    """Makes Hydra know what is not found by its own search: it cannot walk an editable installation."""
    plugins = Plugins.instance()
    from hydra_plugins.qbench_sweeper import QBenchSweeper  # after Hydra's search, which may execute it again

    plugins.register(ThirdPartyConf)
    plugins.register(QBenchSweeper)


def help_text(overrides: Sequence[str]) -> str:
    """What `--help` says: `hydra.help` of conf/, as Hydra fills it in, but not in its second and more."""
    composed = _compose(overrides)
    groups = "\n".join(f"{group}: {', '.join(options(group))}" for group in GROUPS)
    template = Template(composed.hydra.help.template)
    with open_dict(composed):
        del composed["hydra"]
    places = {"APP_CONFIG_GROUPS": groups, "CONFIG": OmegaConf.to_yaml(composed), "FLAGS_HELP": "", "HYDRA_HELP": ""}
    return template.substitute(places)


def check_added(overrides: Sequence[str]) -> None:
    """Raises RequestError for `+hydra.KEY=VALUE` with a key that Hydra does not have: it would add any."""
    parsed = [command_line.parse(text) for text in overrides]
    added = [o.key_or_group for o in parsed if (o.is_add() or o.is_force_add()) and o.key_or_group.startswith("hydra.")]
    for key in added:
        if (refusal := _unknown_to_hydra(key, overrides)) is not None:
            raise refusal


def explain(error: Exception, overrides: Sequence[str]) -> RequestError:
    """One sentence for an error of Hydra, OmegaConf or YAML about these `overrides` of the command line."""
    if isinstance(error, MissingMandatoryValue):
        return RequestError(f"{error.full_key} must be set: {error.full_key}=VALUE", key=error.full_key)
    if isinstance(error, YAMLError):
        return RequestError(about_yaml(error))
    if isinstance(error, UnicodeDecodeError):
        return RequestError(f"a YAML file is not UTF-8 text (byte {error.start}): save it as UTF-8")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.partition("/")
        if group in GROUPS:
            return unknown(group, option, options(group))  # Hydra's own list lacks those in folders below
        group, _, option = error.missing_cfg_file.rpartition("/")
        return unknown(group, option, error.options)
    text = str(error)
    if isinstance(error, OverrideParseException):
        try:
            command_line.parse(error.override)
        except RequestError as refusal:
            return refusal
    # only a key that is not in the schema; a value of the wrong type is said by OmegaConf itself below
    if found := re.search(r"Could not override '([^']+)'\.?", text):
        key = found.group(1)
        if key.startswith("hydra.") and (refusal := _unknown_to_hydra(key, overrides)) is not None:
            return refusal
        if key not in (keys := legal_keys(overrides)):
            return unknown("key", key, _nearest(key, keys))
    cause = error.__cause__ or error.__context__
    lines = [line.strip() for line in f"{text}\n{cause or ''}".splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
    sentence = ": ".join(dict.fromkeys(kept[:2])).replace("::", ":")
    return RequestError(sentence, key=getattr(cause, "full_key", None))


def about_yaml(error: YAMLError) -> str:
    """One sentence for a file that is no YAML, with the line and column if the parser knows them."""
    mark = getattr(error, "problem_mark", None)
    place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a YAML file"
    return f"{place}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"


def legal_keys(overrides: Sequence[str]) -> list[str]:
    """Every key the command line may set, for the groups that these overrides select; none of Hydra's own."""
    composed = OmegaConf.to_container(_compose(overrides), resolve=False)
    del composed["hydra"]
    return [*GROUPS, *_flatten(composed)]


def _compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration of the options that these overrides choose, Hydra's own as well."""
    state = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("qbench.conf", version_base="1.3"):
            try:
                return compose("config", overrides=command_line.chosen(overrides), return_hydra_config=True)
            except (HydraException, OmegaConfBaseException):  # they choose what --config-dir brings, or what is wrong
                return compose("config", return_hydra_config=True)
    finally:
        Singleton.set_state(state)


def _unknown_to_hydra(key: str, overrides: Sequence[str]) -> RequestError | None:
    """What is wrong with a key `hydra.A.B`, or None: a mapping such as hydra.job.env_set takes any key."""
    node, path = _compose(overrides), ""
    for part in key.split("."):
        if not isinstance(node, DictConfig) or (OmegaConf.get_type(node) is dict and path not in OPTIONS_OF_HYDRA):
            return None
        if part not in node:
            prefix = f"{path}." if path else ""
            return unknown("key", key, (f"{prefix}{choice}" for choice in node if not str(choice).startswith("_")))
        if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part):
            return None
        node, path = node[part], f"{path}.{part}" if path else part
    return None


def _nearest(key: str, keys: list[str]) -> list[str]:
    """The keys of the same group, or the top-level ones: nobody reads sixty choices."""
    group = key.partition(".")[0]
    same = [k for k in keys if k.startswith(f"{group}.")] if "." in key else []
    return same or [k for k in keys if "." not in k]


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys
