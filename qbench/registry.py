"""Finds what extends qbench by entry points; nothing is imported until it is asked for.

Eight kinds of thing can come from a third party's package, which edits nothing here:

| kind | entry-point group | the setting that names it | its interface |
|---|---|---|---|
| quantizer | `qbench.quantizers` | `quantizer.name` | qbench.quant.quantizer.Quantizer |
| source | `qbench.sources` | `model.source` | qbench.sources.source.Source |
| transform | `qbench.transforms` | `transform.name` | qbench.transforms.transform.Transform |
| format | `qbench.formats` | none: a quantizer returns it | qbench.format.format.Format |
| reader | `qbench.readers` | none: a file is told by its content | qbench.readers.reader.Reader |
| protocol | `qbench.protocols` | `task.protocol` | qbench.evaluate.protocol.Protocol |
| tracker | `qbench.trackers` | `tracker.name` | qbench.track.tracker.Tracker |
| exporter | `qbench.exporters` | `export.format` | qbench.checkpoint.exporter.Exporter |

A member is a frozen dataclass whose fields are its settings, and a package names it like this:

    [project.entry-points."qbench.quantizers"]
    mymethod = "my_package.mymethod:MyMethod"
    [project.entry-points."qbench.conf"]
    my_package = "my_package.conf"                # the package that holds quantizer/mymethod.yaml
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from qbench.checkout import entry_points
from qbench.errors import RequestError, unknown
from qbench.values import typed

if TYPE_CHECKING:
    from qbench.quant.quantizer import Quantizer

CONF = "qbench.conf"


@dataclass(frozen=True)
class Kind:
    """A kind of extension: how it is called, where it is named in the configuration, and what a member must offer."""

    name: str  # quantizer, source, ...: as in `unknown quantizer 'sink'`
    node: str  # of the configuration: quantizer, model, task, tracker, export
    key: str  # of the node that names the member: name, source, protocol, format
    interface: str  # MODULE:CLASS

    @property
    def group(self) -> str:
        return f"qbench.{self.name}s"

    @property
    def asked(self) -> str:
        """What names a member, as a sentence says it: quantizer, model.source, export.format; format for a format."""
        return self.name if self.key in ("", "name") else f"{self.node}.{self.key}"

    def said(self, name: str) -> str:
        """As the command line chooses the member: `quantizer=rtn`, `model.source=hub`."""
        return f"{self.node}={name}" if self.key == "name" else f"{self.node}.{self.key}={name}"


QUANTIZER = Kind("quantizer", "quantizer", "name", "qbench.quant.quantizer:Quantizer")
SOURCE = Kind("source", "model", "source", "qbench.sources.source:Source")
TRANSFORM = Kind("transform", "transform", "name", "qbench.transforms.transform:Transform")
FORMAT = Kind("format", "", "", "qbench.format.format:Format")
PROTOCOL = Kind("protocol", "task", "protocol", "qbench.evaluate.protocol:Protocol")
TRACKER = Kind("tracker", "tracker", "name", "qbench.track.tracker:Tracker")
READER = Kind("reader", "", "", "qbench.readers.reader:Reader")
EXPORTER = Kind("exporter", "export", "format", "qbench.checkpoint.exporter:Exporter")
KINDS = (QUANTIZER, TRANSFORM, SOURCE, FORMAT, READER, PROTOCOL, TRACKER, EXPORTER)


def names(kind: Kind) -> list[str]:
    """What is registered, in the order of the alphabet."""
    return sorted({entry.name for entry in entry_points(group=kind.group)})


def find(kind: Kind, name: str) -> type[Any]:
    """The class registered as `name`.

    Raises RequestError if there is none (the choices are listed), if two packages claim the name, if it cannot be
    imported, or if it lacks what the kind's interface asks for.
    """
    found = {entry.value: entry for entry in entry_points(group=kind.group) if entry.name == name}
    if not found:
        raise unknown(kind.asked, name, names(kind))
    if len(found) > 1:
        raise RequestError(f"two packages register the {kind.name} '{name}': {', '.join(sorted(found))}; keep one")
    (entry,) = found.values()
    try:
        loaded = entry.load()
    except (ImportError, AttributeError) as error:
        raise RequestError(f"the {kind.name} '{name}' ({entry.value}) cannot be imported: {error}") from error
    if lacking := _lacking(kind, loaded):
        raise RequestError(
            f"'{entry.value}' ({kind.name} '{name}') is no {kind.interface.replace(':', '.')}: {lacking}"
        )
    return loaded


def make(kind: Kind, settings: Mapping[str, Any]) -> Any:
    """Builds the member that `settings[kind.key]` names from the other settings, its fields.

    Raises RequestError for an unknown name or field, a value of another type than the field's, or one that the member
    refuses with a ValueError.
    """
    values = dict(settings)
    name = str(values.pop(kind.key, ""))
    cls = find(kind, name)
    legal = [field.name for field in fields(cls) if field.init]
    for key in values:
        if not legal:
            sentence = f"unknown key {kind.node}.{key}: {kind.said(name)} has no settings; leave it out"
            raise RequestError(sentence, key=f"{kind.node}.{key}")
        if key not in legal:
            raise unknown(f"key for {kind.said(name)}:", f"{kind.node}.{key}", (f"{kind.node}.{k}" for k in legal))
    types = _types(cls)
    values = {key: typed(f"{kind.node}.{key}", value, types.get(key, Any)) for key, value in values.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        field = next((word for word in re.findall(r"\w+", str(error)) if word in legal), None)
        key = f"{kind.node}.{field}" if field else None
        raise RequestError(f"{kind.said(name)}: {error}", key=key, choices=getattr(error, "choices", ())) from None


def _types(cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # a type that is imported for the type checker alone
        return {}


def quantizer_names() -> list[str]:
    """The methods, `none` included, which is the original as a row."""
    return names(QUANTIZER)


def quantizer_class(name: str) -> type[Quantizer]:
    """As `find`."""
    return find(QUANTIZER, name)


def make_quantizer(settings: Mapping[str, Any]) -> Quantizer:
    """As `make`."""
    return make(QUANTIZER, settings)


def _lacking(kind: Kind, loaded: Any) -> str | None:
    """What keeps `loaded` from being a member of the kind: it must be a dataclass with all that the interface names."""
    module, _, cls = kind.interface.partition(":")
    interface = getattr(import_module(module), cls)
    if not isinstance(loaded, type):
        return "it is not a class"
    if not getattr(interface, "_is_protocol", False):
        return None if issubclass(loaded, interface) else "it does not subclass it"
    if not is_dataclass(loaded):
        return "it is not a dataclass"
    wanted = {n for n in (*vars(interface), *interface.__annotations__) if not n.startswith("_")}
    offered = {*dir(loaded), *(field.name for field in fields(loaded))}
    missing = sorted(wanted - offered)
    return f"it has no {', '.join(missing)}" if missing else None


def conf_packages() -> list[str]:
    """Packages of third parties that hold Hydra configuration."""
    return sorted({entry.value for entry in entry_points(group=CONF)})
