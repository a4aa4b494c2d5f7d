"""The plan of a sweep: what its settings expand to, and every point checked before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qbench.config import Config
from qbench.errors import RequestError
from qbench.request import experiment
from qbench.request import explain as requests
from qbench.request.hubnames import spelled_out
from qbench.request.overrides import check, check_keys

if TYPE_CHECKING:
    from qbench.record.result import Result
    from qbench.request.prepare import Prepared


@dataclass(frozen=True)
class Planned:
    overrides: tuple[str, ...]
    label: str
    point: Prepared
    recorded: Result | None


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
        overrides = parser.parse_overrides([*(experiment.assignment(k, v) for k, v in product.items()), *arguments])
        check([o.input_line or "" for o in overrides])
        for override in overrides:
            if override.is_sweep_override() and override.get_key_element() == "experiment":
                raise RequestError("one experiment at a time: an experiment is a sweep already")
        found += [tuple(spelled_out(p)) for p in BasicSweeper.split_arguments(overrides, None)[0]]
    if not found:
        raise RequestError(f"{' '.join(arguments)} chooses no point: a glob(...) that matches none of its options")
    return list(dict.fromkeys(found))


def plan(found: list[tuple[str, ...]], composed: DictConfig, loader: ConfigLoader, where: str) -> list[Planned]:
    """Every point once, in order; raises RequestError, with a sentence for each, if any of them cannot be served.

    `composed` is what Hydra made of the command line, from which the points differ by their overrides; `where` they
    will run is as `launch.placement` says.
    """
    from qbench.evaluate import measure
    from qbench.evaluate.text import read_calibration
    from qbench.request.prepare import fingerprint, prepare

    common = set(found[0]).intersection(*found[1:])
    shared = [_remembered(function) for function in (fingerprint, measure.read, read_calibration)]
    planned: dict[str, Planned] = {}
    refused: dict[str, list[str]] = {}  # sentence -> the points it is about
    exports: dict[Path, str] = {}
    for overrides in found:
        label = " ".join(o for o in overrides if o not in common) or " ".join(overrides) or "defaults"
        try:
            config = _compose(overrides, composed, loader)
            if where == "slurm" and config.runtime.device == "auto":
                raise RequestError("runtime.device=auto would mean this machine; with a Slurm launcher say cuda or cpu")
            point = prepare(config, list(overrides), where != "slurm", *shared)
            if point.export is not None and exports.setdefault(point.export, point.run_id) != point.run_id:
                raise RequestError(
                    f"export.dir={point.export} would hold the checkpoint of another point of this sweep; use "
                    "'${quantizer.name}' and '${quantizer.nbits}' in the name"
                )
        except RequestError as error:
            refused.setdefault(str(error), []).append(label)
        else:
            # such as the commit of a branch, which may move before the point runs
            overrides = (*overrides, *(f"model.{key}={value}" for key, value in point.pinned.items()))
            planned.setdefault(point.run_id, Planned(overrides, label, point, point.recorded()))
    if refused:
        raise RequestError(_refusal(refused, len(found)))
    return list(planned.values())


def _compose(overrides: tuple[str, ...], composed: DictConfig, loader: ConfigLoader) -> Config:
    try:
        point = loader.load_sweep_config(composed, list(overrides))
        with open_dict(point):
            del point["hydra"]
        check_keys(point)
        return OmegaConf.to_object(point)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise RequestError(requests.explain(error, overrides)) from None


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Points of a sweep share models and texts: each is fingerprinted or read once."""
    known: dict[str, Any] = {}

    def call(*configs: Any) -> Any:
        if (name := repr(configs)) not in known:
            known[name] = function(*configs)
        return known[name]

    return call


def _refusal(refused: Mapping[str, list[str]], total: int) -> str:
    if len(refused) == 1 and len(next(iter(refused.values()))) == total:
        return next(iter(refused)).replace("\n", " ")
    count = sum(map(len, refused.values()))
    lines = [f"  {label}: {sentence}".replace("\n", " ") for sentence, labels in refused.items() for label in labels]
    return "\n".join([f"{count} of {total} points cannot run, so none was started:", *lines])
