"""Whether the files of a checkpoint held the very model that its configuration describes.

transformers fills a tensor that is not there at random and drops one that it has no place for, with a warning. Here
both are refused, by name. What an architecture declares as no fault is not in the report: tied weights, which are
stored once, buffers of old versions, the layers for multi-token prediction that a class does not use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qbench.errors import RequestError
from qbench.sources.files import ModelError

SHOWN = 3  # names in a sentence


def require_complete(model: Any, report: Mapping[str, Any], name: str) -> None:
    """Raises RequestError unless `report`, transformers' loading info, is empty and the weights are numbers as such."""
    found = []
    if missing := sorted(report["missing_keys"]):
        found.append(f"{_count(missing)} missing and would be random: {_names(missing)}")
    if unexpected := sorted(report["unexpected_keys"]):
        found.append(f"{_count(unexpected)} not part of the model: {_names(unexpected)}")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{key} {list(stored)} in place of {list(wanted)}" for key, stored, wanted in mismatched]
        found.append(f"{_count(shapes)} of another shape: {_names(shapes)}")
    if errors := report["error_msgs"]:
        found.append(" ".join(str(errors[0]).split())[:200])
    if found:
        raise RequestError(
            f"the weights of {name} are not those of its config.json: {'; '.join(found)}. Save the model anew with "
            "save_pretrained, or mend its config.json"
        )
    require_floats((parameter.dtype for parameter in model.parameters()), name)


def require_floats(dtypes: Iterable[torch.dtype], name: str) -> None:
    """Raises ModelError when weights are integers or have fewer than 16 bits; loading would cast such codes."""
    codes = sorted({str(dtype) for dtype in dtypes if not dtype.is_floating_point or dtype.itemsize < 2})
    if codes:
        raise ModelError(
            f"{name} is quantized already ({', '.join(codes)}): name the checkpoint it was made of, in 16 or 32 bits"
        )


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
