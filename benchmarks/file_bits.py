"""Whether the readers decode files of the reference model to the bits of the libraries that made them.

    python benchmarks/files.py write DIR                writes them
    python benchmarks/file_bits.py DIR -o JSON          prints a row a file; exit status 1 if one tensor differs

Decoders are those of the packages gguf (its own, in numpy), bitsandbytes and sinq. Of a GGUF file every tensor is
compared, as it lies in the file; of the others every linear, in the precision in which their library computes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.model.gguf_names import in_a_file
from qbench.readers.file import reader_of
from qbench.sources import smollm2

DECODERS = {"gguf": "gguf", "bitsandbytes": "bitsandbytes", "sinq": "sinq"}  # reader -> package


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("SINQ_AUTO_PATCH", "0")
    original, rows = smollm2.prepare(Path("outputs/models"), 0), []
    for path in sorted(path for path in asked.folder.iterdir() if not path.name.startswith(".")):
        name, reader = reader_of(path)
        if name not in DECODERS:
            continue
        held = reader.open(path, skeleton(original))
        weights = different = 0
        kinds: set[str] = set()
        for key, expected in decoded(name, path, held):
            found = held.read(key)
            ours = found if isinstance(found, Tensor) else found.dequantize(expected.dtype)
            different += not torch.equal(ours.to(expected.dtype), expected)
            weights, kinds = weights + 1, kinds | {held.entries[key].kind}
        by = f"{DECODERS[name]} {version(DECODERS[name])}"
        rows.append({"file": path.name, "decoder": by, "kinds": sorted(kinds)})
        rows[-1] |= {"tensors": weights, "tensors_that_differ": different}
        print(f"{path.name}: {weights} tensors ({', '.join(sorted(kinds))}), {different} differ from {by}", flush=True)
    if asked.output:
        about = {"model": "SmolLM2-135M-Instruct, as embedded", "torch": torch.__version__, "rows": rows}
        asked.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return int(any(row["tensors_that_differ"] for row in rows))


def skeleton(original: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original))


def decoded(name: str, path: Path, held: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and numbers of each weight, as its own library decodes it."""
    if name == "gguf":
        yield from with_gguf(path, held)
    elif name == "bitsandbytes":
        yield from with_bitsandbytes(path)
    else:
        yield from with_sinq(path)


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


if __name__ == "__main__":
    sys.exit(main())
