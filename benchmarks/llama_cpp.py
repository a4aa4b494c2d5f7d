"""Perplexity and divergence of GGUF files, as qbench reads them beside llama.cpp itself on the same tokens.

    python benchmarks/llama_cpp.py --text wiki.test.raw --reference F32.gguf Q8_0.gguf Q4_K.gguf
    python benchmarks/llama_cpp.py --text wiki.test.raw --write q8_0 q4_k q2_k      the reference model in these types

It needs llama-cpp-py-sync==0.11548 and cffi; where the library in there asks for a newer libc than is here, that of the
same llama.cpp in xllamacpp==2026.10.11549 is taken. Both sides are handed the same ids in windows without a BOS, and
score every token but a window's first. qbench computes in fp32 with the decoded weights. llama.cpp keeps keys and
values in fp32 here, but rounds activations to 8 bits where it multiplies with quantized weights. So it is asked twice:
with the file, and with the same file's decoded weights as F32, of which it rounds nothing. The latter is qbench's
computation, and has to give its numbers. KL is to the reference, on each side its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.checkpoint import gguf as checkpoint
from qbench.sources import smollm2
from qbench.sources.file import File

CPU = torch.device("cpu")


def opened(path: Path, length: int) -> Any:
    """The file in llama.cpp, for windows of `length` tokens."""
    from llama_cpp_py_sync import Llama, _cffi_bindings

    if found := importlib.util.find_spec("xllamacpp"):
        library = next(Path(found.submodule_search_locations[0]).glob("*.so"))
        _cffi_bindings._find_library = lambda: str(library)
    exact = dict(type_k="f32", type_v="f32", flash_attn_type=0)
    return Llama(str(path), n_ctx=length, n_batch=length, n_ubatch=length, n_threads=1, **exact)


def served(path: Path, windows: Tensor) -> Iterator[Tensor]:
    """llama.cpp's logits of each window, fp32 `[tokens, vocabulary]`."""
    length = windows.shape[1]
    llama = opened(path, length)
    ffi, library = llama._ffi, llama._lib
    for window in windows.tolist():
        library.llama_memory_clear(library.llama_get_memory(llama._ctx), True)
        batch = library.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if library.llama_decode(llama._ctx, batch):
            raise SystemExit(f"{path.name}: llama.cpp could not compute a window")
        count = length * llama.n_vocab
        held = ffi.buffer(library.llama_get_logits(llama._ctx), 4 * count)
        yield torch.from_numpy(np.frombuffer(held, dtype=np.float32).copy()).view(length, -1)
        library.llama_batch_free(batch)
    llama.close()


@torch.no_grad()
def ours(path: Path, windows: Tensor) -> Iterator[Tensor]:
    """qbench's logits of each window, fp32 `[tokens, vocabulary]`."""
    model = File(path=str(path)).load(torch.float32, CPU, Path(tempfile.gettempdir())).model
    for window in windows:
        yield model(window[None]).logits[0]


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    p, q = (values[:-1].double().log_softmax(-1) for values in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


def decoded(path: Path) -> Path:
    """The same weights as F32, in a file beside."""
    if not (written := path.with_name(f"{path.stem}-decoded.gguf")).is_file():
        source = File(path=str(path))
        loaded = source.load(torch.float32, CPU, Path(tempfile.gettempdir()))
        checkpoint.write(loaded.model, loaded.tokenizer, written)
    return written


def measure(files: list[Path], reference: Path, windows: Tensor) -> list[dict[str, Any]]:
    sides = {"llama.cpp": served, "llama.cpp, decoded": served, "qbench": ours}
    original = {read: list(read(reference, windows)) for read in (served, ours)}
    print(f"{len(windows)} windows of {windows.shape[1]} tokens; reference {reference.name}")
    rows = []
    for file in files:
        for side, read in sides.items():
            losses, kls = [], []
            path = decoded(file) if side.endswith("decoded") else file
            for ids, logits, before in zip(windows, read(path, windows), original[read], strict=True):
                losses.append(nll(logits, ids))
                kls.append(divergence(before, logits))
            found = {"perplexity": float(torch.cat(losses).mean().exp()), "kl": float(torch.cat(kls).mean())}
            rows.append({"file": file.name, "side": side} | found)
        ours_, *others = reversed(rows[-len(sides) :])
        print(f"{file.name:20} {'qbench':20} {ours_['perplexity']:12.5f}           {ours_['kl']:11.7f}")
        for row in reversed(others):
            ratios = {key: row[key] / ours_[key] if ours_[key] else 1.0 for key in ("perplexity", "kl")}
            said = f"{row['perplexity']:12.5f} ({ratios['perplexity']:7.5f}) {row['kl']:11.7f} ({ratios['kl']:7.5f})"
            print(f"{'':20} {row['side']:20} {said}", flush=True)
    return rows


def write(folder: Path, types: list[str]) -> list[Path]:
    """The reference model (smollm2) as GGUF files: F32, then each type; the linears alone are quantized."""
    from qbench.passes.quantize import quantize_model
    from qbench.registry import make_quantizer

    cache, written = Path("outputs/models"), []
    for type in ("f32", *types):
        if not (path := folder / f"smollm2-{type}.gguf").is_file():
            loaded = smollm2.SmolLM2().load(torch.float32, CPU, cache)
            if type != "f32":
                quantize_model(loaded.model, make_quantizer({"name": f"gguf/{type}"}))
            checkpoint.write(loaded.model, loaded.tokenizer, path)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files; none: types of --write")
    parser.add_argument("--reference", type=Path, help="the GGUF file that KL is taken to")
    parser.add_argument("--write", nargs="*", default=[], metavar="TYPE", help="write the reference model as these")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write them")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files, reference = arguments.files, arguments.reference
    if arguments.write:
        reference, *files = write(arguments.folder, arguments.write)
    tokenizer = File(path=str(reference)).tokenizer(Path(tempfile.gettempdir()))
    count = arguments.windows * arguments.window
    text = arguments.text.read_text(encoding="utf-8")[: 16 * count]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:count]
    rows = measure(files, reference, torch.tensor(ids).view(arguments.windows, arguments.window))
    if arguments.output:  # other files' rows stay
        about: dict[str, Any] = {"text": arguments.text.name, "windows": arguments.windows, "window": arguments.window}
        known = json.loads(arguments.output.read_text())["rows"] if arguments.output.is_file() else []
        about["rows"] = [row for row in known if row["file"] not in {row["file"] for row in rows}] + rows
        arguments.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
