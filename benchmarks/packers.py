"""AutoGPTQ's and AutoAWQ's own packers and decoders, and folders of the reference model that they pack.

Both packages are frozen and import no more as a whole: `make oracle` puts them aside, and single modules are taken from
there. Codes and scales are qbench's, of methods that the formats have room for. GPTQ's columns are in act-order. AWQ's
channel scales are folded, as AutoAWQ does it: into the norm before, of the linears that read one; into the rows of up,
of down; o has none, since v has fewer heads than q.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qbench.format.weight import QuantizedWeight
from qbench.layers.linear import QuantLinear
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer

ORACLE = Path(sys.prefix) / "oracle"
GROUP = 64
FOLDED = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}  # of a linear group


def module(package: str, name: str) -> Any:
    """One module of a package that lies aside, by itself."""
    spec = importlib.util.spec_from_file_location(f"oracle_{package}", ORACLE / package / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def autogptq() -> type:
    """AutoGPTQ's linear in torch, which packs and multiplies."""
    return module("auto_gptq", "nn_modules/qlinear/qlinear_cuda").QuantLinear


def autoawq() -> type:
    """AutoAWQ's linear of the version gemm, which packs."""
    sys.path.append(str(ORACLE))
    try:
        for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):  # what they import is gone
            sys.modules[name] = alone = ModuleType(name)
            alone.__path__ = [str(ORACLE.joinpath(*name.split(".")))]
        return importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    finally:
        sys.path.remove(str(ORACLE))


def with_autogptq(model: Any, calibration: Any, path: Path, nbits: int) -> None:
    """Packs what GPTQ makes of `model`, fp16, in the first convention of zero points."""
    how = {"name": "gptq", "nbits": nbits, "group_size": GROUP, "symmetric": True, "act_order": True}
    quantize_model(model, make_quantizer(how), calibration)
    linear, parts = autogptq(), {}
    for name, layer in linears(model):
        weight = layer.quantized
        rows, columns = weight.shape
        g_idx = torch.arange(columns) // GROUP
        if weight.permutation is not None:
            g_idx = g_idx[weight.permutation.long().argsort()]
        made = linear(nbits, GROUP, columns, rows, bias=False)
        zero = torch.full(weight.scale.stored.shape, 2.0 ** (nbits - 1))
        made.pack(dense(weight.dequantize()), weight.scale.dense(), zero, g_idx)
        parts[name] = {part: getattr(made, part) for part in ("qweight", "qzeros", "g_idx")}
        parts[name] |= {"scales": made.scales.half(), "g_idx": made.g_idx.int()}
    settings = {"quant_method": "gptq", "bits": nbits, "group_size": GROUP, "desc_act": True, "sym": True}
    save(model, path, parts, settings | {"checkpoint_format": "gptq"})


def with_autoawq(model: Any, calibration: Any, path: Path) -> None:
    """Packs what AWQ makes of `model`, fp16, with its channel scales in the layers before."""
    untouched = {name: layer.weight.detach().clone() for name, layer in linears(model, nn.Linear)}
    quantize_model(model, make_quantizer({"name": "awq", "group_size": GROUP}), calibration)
    plain, linear, parts = make_quantizer({"name": "rtn", "group_size": GROUP}), autoawq(), {}
    layers = dict(linears(model))
    for name, layer in layers.items():
        block, _, own = name.partition(".layers.")[2].partition(".")
        weight: QuantizedWeight = layer.quantized
        if own == "self_attn.o_proj":
            [weight] = plain.quantize([untouched[name]], None)
        scale, zero = weight.scale.dense(), weight.zero.dense()
        if own == "mlp.up_proj":
            after = layers[name.replace("up_proj", "down_proj")].quantized
            scale = (scale * after.input_scale.float()[:, None]).half().float()
        if own in FOLDED:
            norm = model.get_submodule(f"model.layers.{block}.{FOLDED[own]}").weight
            norm.data = (norm.data.float() * weight.input_scale.float()).to(norm.dtype)
        room = zero.clamp(0, 15)  # of a group whose weights all lie on one side of zero
        wide = lambda values: values.repeat_interleave(GROUP, 1)  # noqa: E731
        codes = (weight.codes() - wide(zero) + wide(room)).clamp(0, 15)
        packed = linear.from_linear(
            dense((codes - wide(room)) * wide(scale)), 4, GROUP, False, scale.T.contiguous(), room.T.contiguous()
        )
        parts[name] = dict(packed.state_dict())
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    save(model, path, parts, settings)


def linears(model: Any, kind: type = QuantLinear) -> list[tuple[str, Any]]:
    """The linears of the model's blocks, by name."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind) and ".layers." in name]


def dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.float()
    return layer


def save(model: Any, path: Path, parts: dict[str, dict[str, Tensor]], settings: dict[str, Any]) -> None:
    """Writes config.json with `settings`, and one file: `parts` of each linear, everything else as the model has it."""
    tensors = {f"{name}.{part}": value for name, held in parts.items() for part, value in held.items()}
    for name, value in model.named_parameters():
        if name.rpartition(".")[0] not in parts:
            tensors[name] = value.detach()
    path.mkdir(parents=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), encoding="utf-8")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
