"""Whether the readers decode files of the reference model to the bits of the libraries that made them.

    python benchmarks/files.py write DIR                writes them
    python benchmarks/file_bits.py DIR -o JSON          prints a row a file; exit status 1 if one number differs

Decoders are those of the packages: gguf's own in numpy, bitsandbytes', sinq's, hqq's, compressed-tensors', AutoGPTQ's
and AutoAWQ's in torch. Of a GGUF file every tensor is compared, as it lies in the file; of the others every linear, in
the precision in which their library computes. A file that is in the JSON already, of the same size, is not read again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import packers
import torch
from safetensors.torch import load_file
from torch import Tensor

from qbench.model.gguf_names import in_a_file
from qbench.readers.file import reader_of
from qbench.sources import smollm2

DECODERS = {  # reader -> package
    "gguf": "gguf",
    "bitsandbytes": "bitsandbytes",
    "sinq": "sinq",
    "hqq": "hqq",
    "compressed-tensors": "compressed-tensors",
    "gptq": "auto-gptq",
    "awq": "autoawq",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("SINQ_AUTO_PATCH", "0")
    original, rows = smollm2.prepare(Path("outputs/models"), 0), []
    known = json.loads(asked.output.read_text())["rows"] if asked.output and asked.output.is_file() else []
    for path in sorted(path for path in asked.folder.iterdir() if not path.name.startswith(".")):
        name, reader = reader_of(path)
        if name not in DECODERS:
            continue
        held = reader.open(path, skeleton(original))
        row = {"file": path.name, "file_bytes": held.file_bytes, "decoder": f"{DECODERS[name]} {version_of(name)}"}
        if found := [other for other in known if row.items() <= other.items()]:
            rows += found
            continue
        kinds: set[str] = set()
        row |= {"kinds": [], "tensors": 0, "numbers": 0, "numbers_that_differ": 0}
        for key, expected in decoded(name, path, held):
            read = held.read(key)
            ours = (read if isinstance(read, Tensor) else read.dequantize(expected.dtype)).to(expected.dtype)
            if ours.shape != expected.shape:
                raise SystemExit(f"{path.name}: {key} is {list(ours.shape)}, and {list(expected.shape)} as decoded")
            row["numbers_that_differ"] += int((ours != expected).sum())
            row["tensors"], row["numbers"] = row["tensors"] + 1, row["numbers"] + expected.numel()
            kinds.add(held.entries[key].kind)
        row["kinds"] = sorted(kinds)
        rows.append(row)
        said = f"{row['tensors']} tensors ({', '.join(row['kinds'])}), {row['numbers_that_differ']} numbers differ"
        print(f"{path.name}: {said} from {row['decoder']}'s", flush=True)
        keep(asked.output, rows + [other for other in known if other["file"] not in {row["file"] for row in rows}])
    keep(asked.output, rows)
    return int(any(row["numbers_that_differ"] or not row["tensors"] for row in rows))


def keep(output: Path | None, rows: list[dict[str, Any]]) -> None:
    if output:
        about = {"model": "SmolLM2-135M-Instruct, as embedded", "torch": torch.__version__, "rows": rows}
        output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def version_of(name: str) -> str:
    """Of a decoder; that of a package that lies aside by its folder's name."""
    try:
        return version(DECODERS[name])
    except PackageNotFoundError:
        [found] = packers.ORACLE.glob(f"{DECODERS[name].replace('-', '_')}-*.dist-info")
        return found.name.removesuffix(".dist-info").rpartition("-")[2]


def skeleton(original: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original))


def decoded(name: str, path: Path, held: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and numbers of each weight, as its own library decodes it."""
    ways = {"gguf": lambda path: with_gguf(path, held), "bitsandbytes": with_bitsandbytes, "sinq": with_sinq}
    ways |= {"hqq": with_hqq, "compressed-tensors": with_compressed_tensors, "gptq": with_autogptq, "awq": with_autoawq}
    yield from ways[name](path)


def with_gguf(path: Path, held: Any) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGUFReader, quants

    (file,) = path.glob("*.gguf") if path.is_dir() else [path]
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for key, weight in held.weights.items():
        (piece,) = weight.pieces
        tensor = stored[piece.stored.name]
        rows = torch.tensor(quants.dequantize(tensor.data, tensor.tensor_type)).view(weight.shape)
        yield key, rows[in_a_file(weight.shape[0], weight.heads)] if weight.change == "rows" else rows


def with_bitsandbytes(path: Path) -> Iterator[tuple[str, Tensor]]:
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map={"": "cpu"})
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            yield f"{name}.weight", functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            yield f"{name}.weight", functional.int8_vectorwise_dequant(module.weight.data, scale).half()


def with_sinq(path: Path) -> Iterator[tuple[str, Tensor]]:
    from sinq.patch_model import AutoSINQHFModel

    model = AutoSINQHFModel.from_quantized_safetensors(str(path), torch.bfloat16, device="cpu")
    for name, module in model.named_modules():
        if type(module).__name__ == "SINQLinear":
            yield f"{name}.weight", module.dequantize()


def parts_of(path: Path, mark: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Of every module that has a tensor of the last name `mark`: its name, and its tensors by theirs."""
    stored: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    for module in [key.rpartition(".")[0] for key in stored if key.rpartition(".")[2] == mark]:
        yield module, {key.rpartition(".")[2]: stored[key] for key in stored if key.rpartition(".")[0] == module}


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def with_hqq(path: Path) -> Iterator[tuple[str, Tensor]]:
    from hqq.core.quantize import HQQLinear

    for module, parts in parts_of(path, "W_q"):
        layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        layer.load_state_dict(parts)
        yield f"{module}.weight", layer.dequantize()


def with_compressed_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = settings_of(path)
    for module, parts in parts_of(path, "weight_scale"):
        [group] = settings["config_groups"].values()
        codec = BaseCompressor.get_value_from_registry(group.get("format") or settings["format"])
        yield f"{module}.weight", codec.decompress(parts, QuantizationScheme(**group))["weight"]


def with_autogptq(path: Path) -> Iterator[tuple[str, Tensor]]:
    settings, linear = settings_of(path), packers.autogptq()
    for module, parts in parts_of(path, "qweight"):
        columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
        layer = linear(settings["bits"], settings["group_size"], columns, rows, bias=False)
        layer.autogptq_cuda_available = False  # its own path in torch
        layer.__dict__["_buffers"].update(parts)
        yield f"{module}.weight", layer(torch.eye(columns).half()).T  # sums of one number and zeros


def with_autoawq(path: Path) -> Iterator[tuple[str, Tensor]]:
    dequantize, size = packers.module("awq", "utils/packing_utils").dequantize_gemm, settings_of(path)["group_size"]
    for module, parts in parts_of(path, "qweight"):
        yield f"{module}.weight", dequantize(parts["qweight"], parts["qzeros"], parts["scales"], 4, size).T


if __name__ == "__main__":
    sys.exit(main())
