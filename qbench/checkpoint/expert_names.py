"""How a checkpoint names the matrices of fused experts: transformers' conversion of checkpoints, read backwards.

transformers fuses `mlp.experts.3.gate_proj.weight` and its like while loading. Programs that read a quantized
checkpoint expect each matrix under its own name.
"""

from __future__ import annotations

from typing import Any

from qbench.layers.experts import QuantExperts, form

FUSED = {"MergeModulelist", "Concatenate"}  # what is undone by naming each matrix


def expert_names(model: Any, module: str) -> dict[str, str] | None:
    """Projection -> name in a checkpoint, `*` for the expert's index: `model.layers.0.mlp.experts.*.gate_proj`.

    None for an architecture whose checkpoints do not hold the matrices of `module` one by one, or hold them elsewhere
    than the model does, since then the rest of the model has other names too.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    experts = model.get_submodule(module)
    if isinstance(experts, QuantExperts):
        projections: tuple[str, ...] = experts.projections
    else:
        projections = form(experts).projections
    *first, last = projections
    fused = {"gate_up_proj" if len(first) == 2 else first[0]: first, last: [last]}
    found: dict[str, str] = {}
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter):
            continue
        target, sources = converter.target_patterns[0], list(converter.source_patterns)
        owner, _, parameter = target.rpartition(".")
        names = fused.get(parameter, ())
        if not owner or not f".{module}".endswith(f".{owner}") or len(sources) != len(names):
            continue
        if {type(operation).__name__ for operation in converter.operations} <= FUSED and all(
            source.startswith(f"{owner}.*.") and source.endswith(".weight") for source in sources
        ):
            start = module.removesuffix(owner)
            found |= {name: start + source.removesuffix(".weight") for name, source in zip(names, sources, strict=True)}
    return found if found.keys() == set(projections) else None
