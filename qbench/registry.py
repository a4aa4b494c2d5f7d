"""Finds quantizers by the entry-point group `qbench.quantizers`; nothing is imported until one is asked for.

A third party ships a package with two entry points and edits nothing here:

    [project.entry-points."qbench.quantizers"]
    mymethod = "my_package.mymethod:MyMethod"     # the frozen dataclass
    [project.entry-points."qbench.conf"]
    my_package = "my_package.conf"                # the package that holds quantizer/mymethod.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from qbench.errors import RequestError, unknown

if TYPE_CHECKING:
    from qbench.quant.quantizer import Quantizer

NONE = "none"  # the original as a row: no method, so no package registers it
QUANTIZERS = "qbench.quantizers"
CONF = "qbench.conf"


def quantizer_names() -> list[str]:
    """The methods; `quantizer=none`, which is none, can be asked for besides them."""
    return sorted({entry.name for entry in entry_points(group=QUANTIZERS)})


def quantizer_class(name: str) -> type[Quantizer]:
    """The class registered as `name`; for `none` the one that leaves the model as it is.

    Raises RequestError if there is none (the choices are listed), if two packages claim the name, or if
    what the entry point names is not a Quantizer.
    """
    if name == NONE:
        from qbench.quant.original import Original

        return Original
    found = {entry.value: entry for entry in entry_points(group=QUANTIZERS) if entry.name == name}
    if not found:
        raise unknown("quantizer", name, [NONE, *quantizer_names()])
    if len(found) > 1:
        raise RequestError(f"two packages register the quantizer '{name}': {', '.join(sorted(found))}; keep one")
    (entry,) = found.values()
    from qbench.quant.quantizer import Quantizer

    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Quantizer)):
        raise RequestError(f"'{entry.value}' (quantizer '{name}') is not a qbench.quant.quantizer.Quantizer")
    return loaded


def make_quantizer(settings: Mapping[str, Any]) -> Quantizer:
    """Builds the quantizer that `settings["name"]` names from the other settings, its fields.

    Raises RequestError for an unknown name or field, or a value the quantizer refuses.
    """
    values = dict(settings)
    name = str(values.pop("name", ""))
    cls = quantizer_class(name)
    legal = {field.name for field in fields(cls)}
    for key in values:
        if not legal:
            raise RequestError(f"unknown key quantizer.{key}: quantizer={name} has no settings; leave it out")
        if key not in legal:
            raise unknown(f"key for quantizer={name}:", f"quantizer.{key}", (f"quantizer.{k}" for k in legal))
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"quantizer={name}: {error}") from None


def conf_packages() -> list[str]:
    """Packages of third parties that hold Hydra configuration."""
    return sorted({entry.value for entry in entry_points(group=CONF)})
