"""Composes the configuration of each point of a sweep, as Hydra does it and without its tenth of a second for each.

Most options stand alone: their YAML says nothing of other groups, and nothing else writes into their node. A point
that chooses such options is a copy of what Hydra composed once, with their nodes in place. Whatever is not as plain as
that Hydra composes itself, which is also where its errors come from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qbench.config import Config
from qbench.request import explain as requests
from qbench.request.options import GROUPS
from qbench.request.overrides import check_keys

REFUSALS = (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError)


@dataclass
class _Composed:
    """What Hydra composed, and the option of each group in it."""

    config: DictConfig
    choices: dict[str, str | None]
    replaceable: dict[str, bool] = field(default_factory=dict)  # group -> whether its node can be another option's


class Composer:
    """Called with the overrides of a point, gives the configuration that Hydra would compose of them."""

    def __init__(self, composed: DictConfig, loader: ConfigLoader) -> None:
        """`composed` is what Hydra made of the sweep's command line."""
        self.composed, self.loader = composed, loader
        self.given = list(composed.hydra.overrides.task)
        self.loaded: dict[tuple[str, ...], _Composed] = {}
        self.read: dict[str, ConfigResult | None] = {}
        self.nodes: dict[tuple[str, str], DictConfig | None] = {}

    def __call__(self, overrides: tuple[str, ...]) -> Config:
        """Raises RequestError for what Hydra refuses."""
        try:
            point = self._quickly(overrides)
            if point is None:
                point = self._load(overrides).config
            check_keys(point)
            return OmegaConf.to_object(point)  # type: ignore[return-value]
        except REFUSALS as error:
            raise requests.explain(error, overrides) from None

    def _quickly(self, overrides: tuple[str, ...]) -> DictConfig | None:
        """A copy of what was composed, with the options' nodes and the values in it; None for all but the plain.

        A value that Hydra refuses has to be said in Hydra's words, so that is left to Hydra as well.
        """
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(list(overrides))
        if not all(o.type is OverrideType.CHANGE and o.package is None for o in parsed):
            return None
        chosen = {o.key_or_group: o for o in parsed if o.key_or_group in GROUPS}
        values = [o for o in parsed if o.key_or_group not in GROUPS]
        if any("/" in o.key_or_group for o in values) or not all(isinstance(o.value(), str) for o in chosen.values()):
            return None
        try:
            point = self._with_options(chosen, overrides)
            for value in values:
                OmegaConf.update(point, value.key_or_group, value.value(), merge=True)
        except REFUSALS:
            return None
        return point

    def _with_options(self, chosen: Mapping[str, Override], overrides: tuple[str, ...]) -> DictConfig:
        """A copy of its own of the configuration that these options make; values are not yet in it."""
        nodes = {group: self._node(group, override.value()) for group, override in chosen.items()}
        alone = {group: node for group, node in nodes.items() if node is not None}
        base = self._base([o for group, o in chosen.items() if group not in alone], overrides)
        if not all(self._is_replaceable(base, group) for group in alone):
            base, alone = self._base(chosen.values(), overrides), {}
        point = copy.deepcopy(base.config)
        for group, node in alone.items():
            point[group] = node
        return point

    def _base(self, chosen: Iterable[Override], overrides: tuple[str, ...]) -> _Composed:
        """What Hydra composes of these options, and perhaps of other overrides of the point.

        The sweep's own command line serves, if all that it says the point says as well.
        """
        options = tuple(override.input_line or "" for override in chosen)
        own = set(options) <= set(self.given) <= set(overrides)
        key = ("the sweep's own",) if own else options
        if key not in self.loaded:
            self.loaded[key] = _without_hydra(copy.deepcopy(self.composed)) if own else self._load(options)
        return self.loaded[key]

    def _load(self, overrides: tuple[str, ...]) -> _Composed:
        return _without_hydra(self.loader.load_sweep_config(self.composed, list(overrides)))

    def _is_replaceable(self, base: _Composed, group: str) -> bool:
        """Whether the group's node is that of its option, all of it, and nothing that was chosen depends on it."""
        if group not in base.replaceable:
            own = self._node(group, base.choices.get(group) or "")
            others = {g: o for g, o in base.choices.items() if g != group and o is not None and "/" not in g}
            base.replaceable[group] = (
                own is not None
                and OmegaConf.to_container(base.config[group]) == OmegaConf.to_container(own)
                and all(self._leaves_alone(group, other, option) for other, option in others.items())
            )
        return base.replaceable[group]

    def _leaves_alone(self, group: str, other: str, option: str) -> bool:
        """Whether an option of another group neither writes into this group's node nor depends on its choice."""
        found = self._file(f"{other}/{option}")
        if found is None or not isinstance(found.config, DictConfig):
            return False
        content: Any = OmegaConf.to_container(found.config)
        defaults = content.pop("defaults", [])
        literal = all((isinstance(d, dict) and "${" not in f"{d}") or d == "_self_" for d in defaults)
        package = found.header.get("package")
        return literal and (package in (None, other) or (package == "_global_" and group not in content))

    def _node(self, group: str, option: str) -> DictConfig | None:
        """What the option puts at its group's place, typed by the schema; None unless that is all it does."""
        if (group, option) not in self.nodes:
            found, node = self._file(f"{group}/{option}"), None
            here = found is not None and found.header.get("package") in (None, group)
            if here and isinstance(found.config, DictConfig) and "defaults" not in found.config:
                node = OmegaConf.merge(OmegaConf.structured(Config), {group: found.config})[group]
            self.nodes[group, option] = node
        return self.nodes[group, option]

    def _file(self, path: str) -> ConfigResult | None:
        """The YAML of an option; None if there is none, if it hides another, or if there is a schema for it."""
        if path not in self.read:
            sources = [source for source in self.loader.get_sources() if source.is_config(path)]
            plain = len(sources) == 1 and sources[0].scheme() != "structured"
            self.read[path] = sources[0].load_config(path) if plain else None
        return self.read[path]


def _without_hydra(config: DictConfig) -> _Composed:
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return _Composed(config, choices)
