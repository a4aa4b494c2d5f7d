"""Turns what Hydra says about a wrong command line into one sentence that lists the legal choices."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from qbench.errors import unknown
from qbench.registry import conf_packages

GROUPS = ("model", "quantizer", "task", "calibration", "runtime", "speed", "tracker", "experiment")


class ThirdPartyConf(SearchPathPlugin):
    """Makes the YAML of installed third-party packages selectable by group name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in conf_packages():
            search_path.append(provider="qbench.conf", path=f"pkg://{package}")


def add_third_party_conf() -> None:
    Plugins.instance().register(ThirdPartyConf)


def leave_to_points(arguments: Sequence[str]) -> list[str]:
    """The arguments of a sweep, with the settings of a swept group written so that only the points take them.

    Hydra applies `quantizer.ratios=10` of `quantizer=awq,asinq quantizer.ratios=10` to the default quantizer first,
    which may have no such key; `quantizer.ratios=choice(10)` says the same and reaches the points alone.
    """
    swept = {a.partition("=")[0] for a in arguments if a.partition("=")[0] in GROUPS and "," in a}
    kept = []
    for argument in arguments:
        if argument.lstrip("+").partition(".")[0] in swept and "=" in argument:
            override = OverridesParser.create().parse_override(argument)
            if not override.is_sweep_override():
                argument = f"{override.get_key_element()}=choice({override.get_value_element_as_str()})"
        kept.append(argument)
    return kept


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence for a Hydra or OmegaConf error about these `overrides` of the command line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.partition("/")
        if group in GROUPS:
            from qbench.catalog import options

            return str(unknown(group, option, options(group)))  # Hydra's own list lacks those in folders below
        group, _, option = error.missing_cfg_file.rpartition("/")
        more = "; others come with: pip install 'qbench-llm[launchers]'" if group == "hydra/launcher" else ""
        return f"{unknown(group, option, error.options)}{more}"
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}'; an override has the form KEY=VALUE or GROUP=OPTION"
    # only a key that is not in the schema; a value of the wrong type is said by OmegaConf itself below
    if found := re.search(r"Could not override '([^']+)'\.?", text):
        key = found.group(1)
        if key not in (keys := legal_keys(overrides)):
            return str(unknown("key", key, _nearest(key, keys)))
    cause = error.__cause__ or error.__context__
    lines = [line.strip() for line in f"{text}\n{cause or ''}".splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
    return ": ".join(dict.fromkeys(kept[:2])).replace("::", ":")


def legal_keys(overrides: Sequence[str]) -> list[str]:
    """Every key the command line may set, for the groups that these overrides select."""
    chosen = [a for a in overrides if a.partition("=")[0] in GROUPS and "," not in a]
    state = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("qbench.conf", version_base="1.3"):
            composed = compose("config", overrides=chosen)
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
