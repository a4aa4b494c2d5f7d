"""The plan of a sweep: what its settings expand to, and every point checked before the first one starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer
from omegaconf import DictConfig, OmegaConf

from qbench.config import Config
from qbench.errors import PlanError, RequestError
from qbench.request import experiment, wildcards
from qbench.request.hubnames import spelled_out
from qbench.request.overrides import check, parse
from qbench.sweep.compose import Composer
from qbench.sweep.prepared import remembered

if TYPE_CHECKING:
    from qbench.record.result import Result
    from qbench.request.prepare import Prepared


@dataclass(frozen=True)
class Planned:
    overrides: tuple[str, ...]
    label: str
    request: dict[str, Any]  # the configuration that the overrides ask for, resolved; a branch as its commit
    point: Prepared
    recorded: Result | None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells the points of a sweep apart: a measurement may be recorded, tracked or exported in two places."""
        config = self.point.config
        return (self.point.run_id, config.outputs, repr(config.tracker), repr(config.export))


def expand(arguments: list[str], hydra: DictConfig, loader: ConfigLoader) -> list[tuple[str, ...]]:
    """The overrides of every point: each product in turn; what the command line says comes last and wins."""
    parser = OverridesParser.create(config_loader=loader)
    found: list[tuple[str, ...]] = []
    sweeper = OmegaConf.to_container(hydra.sweeper, resolve=False)
    products, params = sweeper["also"] or [], sweeper["params"] or {}
    if not isinstance(products, list) or not all(isinstance(product, dict) for product in [params, *products]):
        raise RequestError("hydra.sweeper.params must be a mapping of KEY: VALUES, and also a list of such mappings")
    if params or not products:
        products = [params, *products]
    for product in products:
        said = [*(experiment.assignment(k, v) for k, v in product.items()), *arguments]
        overrides = parser.parse_overrides([wildcards.spelled_out(argument) for argument in said])
        check([o.input_line or "" for o in overrides])
        for override in overrides:
            if override.is_sweep_override() and override.get_key_element() == "experiment":
                raise RequestError("one experiment at a time: an experiment is a sweep already")
        found += [tuple(spelled_out(point)) for point in combinations(overrides)]
    if not found:
        raise RequestError(f"{' '.join(arguments)} chooses no point: a glob(...) that matches none of its options")
    return list(dict.fromkeys(found))


def combinations(overrides: Sequence[Override]) -> Iterator[tuple[str, ...]]:
    """Every combination of the values of each key; one that is named twice has its later values, in its first place."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        swept = override.is_sweep_override()
        values = override.sweep_iterator(_written) if swept else [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
    return itertools.product(*choices.values())


def _written(value: Any) -> str:
    """One value of a sweep as an override has it. A text stays one: of choice("64") Hydra takes the quotes off."""
    written = Transformer.str(value)
    if isinstance(value, str) and not isinstance(parse(f"key={written}").value(), str):
        return QuotedString(value, Quote.double).with_quotes()
    return written


def plan(found: list[tuple[str, ...]], composed: DictConfig, loader: ConfigLoader, elsewhere: bool) -> list[Planned]:
    """Every point once, in order; raises RequestError, with a sentence for each, if any of them cannot be served.

    `composed` is what Hydra made of the command line, from which the points differ by their overrides; `elsewhere`
    they will run on machines whose devices are not known.
    """
    from qbench.evaluate import measure
    from qbench.evaluate.text import read_calibration
    from qbench.request import parts
    from qbench.request.prepare import fingerprint, prepare

    compose = Composer(composed, loader)
    found = parts.spelled_out(found, compose)
    common = set(found[0]).intersection(*found[1:])
    shared = [remembered(function) for function in (fingerprint, measure.read, read_calibration)]
    planned: dict[tuple[str, ...], Planned] = {}
    refused: dict[str, list[str]] = {}  # sentence -> the points it is about
    errors: dict[str, RequestError] = {}  # by their sentences
    exports: dict[Path, str] = {}
    asked: list[Config] = []
    for overrides in found:
        label = " ".join(o for o in overrides if o not in common) or " ".join(overrides) or "defaults"
        try:
            config = compose(overrides)
            asked.append(config)
            if elsewhere and config.runtime.device == "auto":
                raise RequestError("runtime.device=auto would mean this machine; with this launcher say cuda or cpu")
            point = prepare(config, list(overrides), not elsewhere, *shared)
            if point.export is not None and exports.setdefault(point.export, point.run_id) != point.run_id:
                raise RequestError(
                    f"export.dir={point.export} would hold the checkpoint of another point of this sweep; use "
                    "'${quantizer.name}' and '${quantizer.nbits}' in the name"
                )
        except RequestError as error:
            refused.setdefault(str(error), []).append(label)
            errors.setdefault(str(error), error)
        else:
            # such as the commit of a branch, which may move before the point runs
            overrides = (*overrides, *(f"model.{key}={value}" for key, value in point.pinned.items()))
            # and the bits that a budget buys, which other points of the sweep may move
            config = replace(config, model=config.model | point.pinned, quantizer=point.config.quantizer)
            each = Planned(overrides, label, asdict(config), point, point.recorded())
            planned.setdefault(each.key, each)
    wildcards.check_read(asked)
    if refused:
        raise _refusal(refused, errors, len(found)) from None
    return list(planned.values())


def _refusal(refused: Mapping[str, list[str]], errors: Mapping[str, RequestError], total: int) -> RequestError:
    if len(refused) == 1 and len(next(iter(refused.values()))) == total:
        return next(iter(errors.values()))
    count = sum(map(len, refused.values()))
    lines = [f"  {label}: {sentence}".replace("\n", " ") for sentence, labels in refused.items() for label in labels]
    said = "\n".join([f"{count} of {total} points cannot run, so none was started:", *lines])
    return PlanError(said, errors.values())
