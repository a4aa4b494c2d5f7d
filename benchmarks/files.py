"""Files of the reference model in the formats that people have, each written by the library that they are made with.

    make oracle                                         bitsandbytes, hqq and sinq, which write theirs
    python benchmarks/files.py write DIR [NAME ...]     the files, a folder each; of all, or of these names
    python benchmarks/file_bits.py DIR -o JSON          what qbench reads of them beside what their libraries decode
    python -m qbench -m experiment=files 'files=DIR/*' task=wikitext2 task.path=TEXT task.window=1024 task.max_windows=8
    python benchmarks/files.py table OUTPUTS            all rows by KL, with the front of KL over the model's bytes

GGUF types are encoded by libgguf, GPTQ is packed as AutoGPTQ does and by AutoGPTQ, AWQ by AutoAWQ (packers.py), the
integers, FP8 and NVFP4 of compressed-tensors as that package lays them out. A file that a library cannot write here is
named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import packers
import torch

from qbench.checkpoint.export import make_exporter
from qbench.config import CalibrationConfig
from qbench.evaluate.text import read_calibration
from qbench.passes.calibrate import Calibration, cut_sequences
from qbench.passes.quantize import quantize_model
from qbench.registry import make_quantizer
from qbench.report import entries
from qbench.sources import smollm2

GGUF = {
    **{name: {} for name in ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k")},
    **{name: {} for name in ("iq3_s", "q2_k")},
    **{f"{name}-imatrix": {"imatrix": True} for name in ("q4_k", "iq4_nl", "iq2_xxs")},
}
EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {  # by the folder's name: format, and what makes the weights
    **{f"gguf-{name}": ("gguf", {"name": f"gguf/{name.removesuffix('-imatrix')}"} | how) for name, how in GGUF.items()},
    **{
        f"compressed-int4-g{size}": ("compressed-tensors", {"name": "rtn", "group_size": size, "symmetric": True})
        for size in (32, 64)
    },
    "compressed-int4-g64-asymmetric": ("compressed-tensors", {"name": "rtn", "group_size": 64}),
    "compressed-int4-g64-order": (
        "compressed-tensors",
        {"name": "gptq", "group_size": 64, "symmetric": True, "act_order": True},
    ),
    "compressed-int4-channel": ("compressed-tensors", {"name": "rtn", "group_size": -1, "symmetric": True}),
    "compressed-int8": ("compressed-tensors", {"name": "rtn", "nbits": 8, "group_size": -1, "symmetric": True}),
    "compressed-fp8": ("compressed-tensors", {"name": "fp8", "scale": "channel"}),
    "compressed-nvfp4": ("compressed-tensors", {"name": "nvfp4"}),
    "gptq-int4-g64": ("autogptq", {"name": "gptq", "group_size": 64, "symmetric": True}),
}
BITSANDBYTES = {
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb-nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("names", nargs="*")
    commands.add_parser("table").add_argument("outputs", type=Path)
    asked = parser.parse_args()
    if asked.command == "write":
        write(asked.folder, asked.names)
    else:
        print(table(asked.outputs))


def write(folder: Path, names: Sequence[str] = ()) -> None:
    """Every file, or of these names, that is not there yet."""
    original = smollm2.prepare(Path("outputs/models"), 0)
    ways: dict[str, Callable[[Path], None]] = {}
    for name, (format, settings) in EXPORTED.items():
        ways[name] = lambda path, f=format, s=settings: export(path, f, s)
    for name, settings in BITSANDBYTES.items():
        ways[name] = lambda path, s=settings: with_bitsandbytes(original, path, s)
    for nbits in (4, 3):
        ways[f"autogptq-int{nbits}-g64"] = lambda path, n=nbits: packers.with_autogptq(*shown(), path, n)
    ways["autoawq-int4-g64"] = lambda path: packers.with_autoawq(*shown(), path)
    ways["hqq-int4-g64"] = lambda path: with_hqq(original, path)
    ways["sinq-int4-g64"] = lambda path: with_sinq(original, path)
    for name in names or ways:
        attempt(folder / name, ways[name])


def attempt(path: Path, make: Callable[[Path], None]) -> None:
    if path.exists():
        return
    try:
        make(path)
        print(f"{path.name}: {sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    except Exception as error:
        print(f"{path.name} is left out: {type(error).__name__}: {error}", file=sys.stderr)


def export(path: Path, format: str, settings: dict[str, Any]) -> None:
    loaded = smollm2.SmolLM2(name="smollm2-135m").load(torch.float16, torch.device("cpu"), Path("outputs/models"))
    quantizer, model = make_quantizer(settings), loaded.model
    shown = calibration(loaded.tokenizer) if quantizer.needs else None
    quantize_model(model, quantizer, shown)
    exporter, _ = make_exporter({"dir": str(path), "format": format})
    about = {"run_id": path.name, "qbench_version": "", "model": {"name": "smollm2-135m"}, "quantizer": settings}
    exporter.save(model, loaded.tokenizer, path, about)


def calibration(tokenizer: Any) -> Calibration:
    asked = CalibrationConfig(name="mini", window=512, sequences=16)
    return cut_sequences(read_calibration(asked), tokenizer, asked)


def shown() -> tuple[Any, Calibration]:
    """The reference model in fp16, and what calibrated methods are shown."""
    loaded = smollm2.SmolLM2(name="smollm2-135m").load(torch.float16, torch.device("cpu"), Path("outputs/models"))
    return loaded.model, calibration(loaded.tokenizer)


def with_bitsandbytes(original: Path, path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"quantization_config": BitsAndBytesConfig(**settings), "dtype": torch.float16, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(original, **how).save_pretrained(path)


def with_hqq(original: Path, path: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float16)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    AutoHQQHFModel.save_to_safetensors(model, str(path))


def with_sinq(original: Path, path: Path) -> None:
    from sinq.patch_model import AutoSINQHFModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import SinqConfig

    config = SinqConfig(nbits=4, group_size=64, method="sinq")
    how = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(original, **how)
    AutoSINQHFModel.save_quantized_safetensors(model, None, str(path), write_tokenizer=False)


def table(outputs: Path) -> str:
    """Markdown, one table a protocol: by KL; the front of KL over bytes is in bold."""
    found = entries.latest(entries.read(outputs).entries)
    said = []
    for protocol in dict.fromkeys(score.protocol for entry in found for score in entry.scores):
        rows = []
        for entry in found:
            for score in (s for s in entry.scores if s.protocol == protocol and s.divergence is not None):
                quantization = entry.result.quantization
                rows.append((score.divergence.kl.value, quantization.model_bytes, entry, score))
        rows.sort(key=lambda row: row[:2])
        said += [
            f"### {protocol}",
            "",
            "| variant | made by | bits/weight | head bits | MB | KL, nats | 95 % | perplexity |",
        ]
        said += ["|---|---|---|---|---|---|---|---|"]
        for kl, size, entry, score in rows:
            quantization, identity = entry.result.quantization, entry.identity.quantizer
            name = (
                entry.file.name
                if entry.file
                else " ".join(str(identity[k]) for k in ("name", "nbits") if k in identity)
            )
            best = not any(other[0] <= kl and other[1] <= size and other[:2] != (kl, size) for other in rows)
            interval = score.divergence.kl
            cells = [f"**{name}**" if best else name, entry.quantizer if entry.file else "qbench"]
            cells += [f"{quantization.bits_per_weight:.2f}", f"{quantization.head_bits:.2f}", f"{size / 1e6:.1f}"]
            cells += [f"{kl:.5f}", f"{interval.low:.5f} to {interval.high:.5f}", f"{score.value:.3f}"]
            said.append(f"| {' | '.join(cells)} |")
        said.append("")
    return "\n".join(said)


if __name__ == "__main__":
    main()
