"""Published numbers to put beside ours: one YAML file per publication, `conf/reference/NAME.yaml` or any path.

    # SINQ (arXiv 2509.22944v4), tables 1 and 5
    source: SINQ, arXiv 2509.22944v4       # shown beside every number
    url: https://arxiv.org/abs/2509.22944
    entries:
      - model: qwen3-1.7b                  # as in conf/model/
        quantizer: sinq                    # as in conf/quantizer/; `none` for the 16-bit model
        nbits: 4                           # bits; left out for `none`
        group_size: 64                     # left out where the publication does not say
        settings: {codebook: null}         # other fields of the quantizer that tell its variants apart; null: not set
                                           # transform, of conf/transform/, is that of the whole point
        protocol: wikitext2:gptq-w2048     # as our results name it; another protocol is another number
        metric: ppl
        value: 17.16
        where: Table 1                     # page, table or figure

A number is put beside a row only if every field that it states is equal: model, quantizer, bits, group size, other
settings, protocol and metric. There is no interval: the publication's windows are not known. `protocol: quantizing` is
that of what no protocol scores, such as `quant_seconds`: it stands beside a row of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qbench.errors import RequestError, unknown
from qbench.registry import conf_packages
from qbench.report.board import Row, Section

QUANTIZING = "quantizing"


@dataclass(frozen=True)
class Published:
    model: str
    quantizer: str
    protocol: str
    value: float
    where: str
    nbits: int | None = None
    group_size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metric: str = "ppl"
    source: str = ""  # filled in from the file

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    @property
    def method(self) -> str:
        """As a row calls it: `presinq+rtn`, where `settings` name a transform."""
        return "+".join([str(t) for t in [self.settings.get("transform")] if t is not None] + [self.quantizer])

    def matches(self, section: Section, row: Row, metric: str) -> bool:
        wanted = (self.model, self.metric, self.method)
        if wanted != (section.model, metric, row.entry.quantizer) or self.protocol not in (
            section.protocol,
            QUANTIZING,
        ):
            return False
        ours = row.entry.identity.quantizer.get
        bits = self.nbits is None or row.entry.bits == self.nbits
        group = self.group_size is None or ours("group_size") == self.group_size
        return bits and group and all(ours(key) == value for key, value in self.settings.items() if key != "transform")


@dataclass(frozen=True)
class Publication:
    source: str
    entries: list[Published]
    url: str | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


def available() -> dict[str, Any]:
    """Name -> file, for ours and for third parties' packages."""
    found = {}
    for package in ("qbench.conf", *conf_packages()):
        folder = resources.files(package) / "reference"
        if folder.is_dir():
            found |= {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return found


def read(name: str) -> list[Published]:
    """The numbers of a publication, by name or by path; raises RequestError naming the first thing that is wrong."""
    import yaml

    file = Path(name) if name.endswith((".yaml", ".yml")) else available().get(name)
    if file is None:
        raise unknown("reference", name, available())
    try:
        publication = TypeAdapter(Publication).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RequestError(f"cannot read the reference {name}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"the reference {name} is not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise RequestError(
            f"the reference {name} is not as qbench/report/published.py says: {place}: {first['msg']}"
        ) from None
    return [Published(**{**vars(entry), "source": publication.source}) for entry in publication.entries]


def beside(published: Sequence[Published], section: Section, row: Row, metric: str | None = None) -> Published | None:
    """The published number of a row, by default of the section's metric: the one that states most, if several fit."""
    fitting = [entry for entry in published if entry.matches(section, row, metric or section.metric)]
    return max(
        fitting, key=lambda e: (e.nbits is not None) + (e.group_size is not None) + len(e.settings), default=None
    )
