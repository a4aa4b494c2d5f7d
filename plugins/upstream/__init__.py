"""Official implementations behind our interface, so that a sweep can put them in the row beside ours.

One file per package, named after the method: `quantizer=upstream/hqq`. Each calls its package, and converts codes,
scales, zero points and t into a QuantizedWeight without touching them, except that aux is stored in fp16 as
everywhere. The packages are optional: nothing here imports one before a quantizer is made that needs it.

`version` is a field of each, so that a result names the code it comes from and an upgrade is another point.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from types import ModuleType

from torch import Tensor


def official(distribution: str, version: str, module: str, beside: str = "") -> ModuleType:
    """`module` of an official package; ValueError, saying what to install, without that package and version.

    `beside`: what else to install, or to do, since the packages' own requirements would replace or add too much.
    """
    install = f"pip install --no-deps {distribution}=={version}{beside}"
    try:
        found = importlib.metadata.version(distribution)
        if found == str(version):  # YAML reads 0.2 as a number
            with contextlib.redirect_stdout(sys.stderr):  # some print when imported
                return importlib.import_module(module)
    except ImportError as error:  # also what importlib.metadata raises for a package that is not installed
        raise ValueError(f"needs the official package {distribution} {version} ({error}): {install}") from None
    raise ValueError(
        f"version={version} is asked for, but {distribution} {found} is installed: set it to that, or {install}"
    )


def whole_groups(weight: Tensor, width: int) -> tuple[int, int]:
    """The shape `[out, groups]` of aux for `[out, in]`; ValueError for a ragged last group.

    The packages cut the flattened weight, where a ragged group would run on into the next row.
    """
    rows, columns = weight.shape
    if columns % width:
        raise ValueError(f"group_size {width} does not divide {columns} input channels, as the package requires")
    return rows, columns // width
