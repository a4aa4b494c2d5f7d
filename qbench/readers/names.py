"""Where the tensors of a checkpoint go in a model: transformers' own renaming, and what it fuses taken apart again.

A checkpoint stores each matrix of a mixture's experts by itself, under names of its architecture's own
(`block_sparse_moe.experts.3.w1`); transformers fuses them while loading. What is quantized is quantized by matrix, so
here every one is named as results name it: `model.layers.0.mlp.experts.3.gate_proj.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from qbench.layers.expert_form import ExpertForm, form
from qbench.model.linears import find_linears
from qbench.readers.reader import ReadError


@dataclass(frozen=True)
class Fused:
    """All matrices of one parameter of fused experts, by `[expert][projection]`, stored as the model has them."""

    module: str
    parameter: str


class Names:
    """Of a model on the meta device.

    `shapes` are those of its parameters by name, of fused experts those of every matrix, `[out, in]`.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._base = model.base_model_prefix
        self._wanted = model.state_dict()
        self._modules = dict(model.named_modules())
        found = find_linears(model)
        self.experts: dict[str, Any] = found.experts
        self.transposed = {f"{name}.weight" for name, layer in found.layers.items() if type(layer).__name__ == "Conv1D"}
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._may_lack = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
        self._may_have = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            module, _, last = name.rpartition(".")
            if module in self.experts and parameter.dim() == 3:
                how = form(self.experts[module])
                for index in range(self.experts[module].num_experts):
                    for projection, shape in matrices(how, last, tuple(parameter.shape)).items():
                        self.shapes[f"{module}.{index}.{projection}.weight"] = shape
            else:
                self.shapes[name] = tuple(parameter.shape)
        self.buffers = {
            name: tuple(self._wanted[name].shape) for name, _ in model.named_buffers() if name in self._wanted
        }

    def place(self, key: str) -> str | Fused | None:
        """What the checkpoint's `key` is in the model: a name in `shapes` or `buffers`, fused experts, or nothing.

        Raises ReadError for a weight that transformers computes anew while loading.
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._base, self._wanted)
        if name not in self._wanted and key in self._wanted:
            name = key
        if name not in self._wanted:
            return None
        module, _, last = name.rpartition(".")
        if pattern is None:
            return Fused(module, last) if module in self.experts and self._wanted[name].dim() == 3 else name
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        operations = {type(operation).__name__ for operation in converter.operations}
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", key)
        if module not in self.experts or not numbers or operations - {"MergeModulelist", "Concatenate"}:
            raise ReadError(f"{key} is not stored as the model holds it, and how it is rearranged is not known here")
        how = form(self.experts[module])
        projections = tuple(matrices(how, last, tuple(self._wanted[name].shape)))
        place = list(converter.source_patterns).index(pattern)
        name = f"{module}.{numbers[-1]}.{projections[min(place, len(projections) - 1)]}.weight"
        return name if name in self.shapes else None

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a linear; GPT-2's Conv1D holds its weight transposed."""
        return self.shapes[name][::-1] if name in self.transposed else self.shapes[name]

    def stack_of(self, name: str) -> str | None:
        """The experts and projection that a matrix is one of: `model.layers.0.mlp.experts.gate_proj`."""
        module, *rest = name.rsplit(".", 3)
        return f"{module}.{rest[1]}" if module in self.experts and len(rest) == 3 and rest[0].isdigit() else None

    def classes(self, name: str) -> tuple[str, ...]:
        """Of the module that holds a weight, with those that it derives from; one expert's matrices are linears."""
        module = self._modules.get(name.rpartition(".")[0])
        return ("Linear",) if module is None else tuple(cls.__name__ for cls in type(module).__mro__)

    def lacking(self, found: set[str]) -> list[str]:
        """The model's weights that none of the entries `found` gives, nor one that they are tied to."""
        absent = [name for name in self.shapes if name not in found]
        same = self.tied | {source: tied for tied, source in self.tied.items()}
        absent = [name for name in absent if same.get(name) not in found]
        return [name for name in absent if not any(pattern.search(name) for pattern in self._may_lack)]

    def superfluous(self, key: str) -> bool:
        """Whether the architecture says that a checkpoint may hold `key` without use."""
        return any(pattern.search(key) for pattern in self._may_have)


def matrices(how: ExpertForm, parameter: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """The matrices `[out, in]` of one expert in a fused parameter of this `shape`, by projection."""
    rows, columns = (shape[2], shape[1]) if how.transposed else (shape[1], shape[2])
    if parameter == how.first and how.gated:
        return {"gate_proj": (rows // 2, columns), "up_proj": (rows // 2, columns)}
    return {parameter: (rows, columns)}


def matrix_of(how: ExpertForm, projection: str, parameter: str, weight: torch.Tensor) -> torch.Tensor:
    """One of `matrices` out of an expert's part of the fused parameter `[., .]`, `[out, in]`."""
    weight = weight.T if how.transposed else weight
    if parameter == how.first and how.gated:
        second = projection == "up_proj"
        weight = weight[second::2] if how.interleaved else weight.chunk(2)[second]
    return weight.contiguous()
