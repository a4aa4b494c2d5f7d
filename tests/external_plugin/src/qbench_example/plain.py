"""export.format=plain: what transformers loads without qbench, the weights dequantized to the model's dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.checkpoint.packed import check_target, new_folder
from qbench.errors import RequestError
from qbench.layers.linear import QuantLinear
from qbench.quant.quantizer import Quantizer

ORIGIN = "made_by_qbench.json"


@dataclass(frozen=True)
class Plain:
    def refuse(self, quantizer: Quantizer) -> str | None:
        return None  # every format dequantizes

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        fused = [name for name, module in model.named_modules() if hasattr(module, "num_experts")]
        return f"{fused[0]} holds fused experts; use export.format=packed" if fused else None

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        check_target(folder, run_id, _origin, "plain checkpoint")

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        self.check_target(folder)
        packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        inside = tuple(f"{name}." for name in packed)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
        for name, layer in packed.items():
            tensors[f"{name}.weight"] = layer.quantized.dequantize(model.dtype).cpu()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias
        with new_folder(folder) as partial:
            model.save_pretrained(partial, state_dict=tensors)
            tokenizer.save_pretrained(partial)
            (partial / ORIGIN).write_text(json.dumps(dict(origin), indent=1), encoding="utf-8")


def _origin(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RequestError(f"{folder} holds no plain checkpoint") from None
