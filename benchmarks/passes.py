"""What a pass costs beside the work that it cannot do without: bare loading, bare forward passes, bare reading.

    python benchmarks/passes.py make --shape qwen3-8b --folder DIR          a random model of that shape, in shards
    python benchmarks/passes.py bare --folder DIR --windows 148             from_pretrained, and the windows' NLL, alone
    python benchmarks/passes.py command --folder DIR --windows 148          the cold command: original and 7 variants
    python benchmarks/passes.py point --folder DIR --windows 40             one RTN point of it, cold
    python benchmarks/passes.py shape --shape deepseek-v2.5 --layers 3      a mixture's variants beside its bare bf16
    python benchmarks/passes.py disk --folder DIR                           blocks through the pass' reader, and bare

Each prints one JSON line and appends it to --out. Windows are 2048 bytes of seeded words; the batches are the pass' own
(runtime.batch_size). Ratios are of one run on one card. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

WINDOW, BATCH = 2048, 8
METHODS = ("rtn", "hqq", "sinq")  # at 4 and 3 bits; and NF4
SHARD_BYTES = "4GB"  # as the Hub's 8B models have them


def text(folder: Path, windows: int) -> Path:
    words = ["the", "quick", "brown", "fox", "of", "and", "house", "river", "was", "green", "1934", "history"]
    path, draw = folder / f"words-{windows}.txt", random.Random(0)
    made = ""
    while len(made) < (windows + 1) * WINDOW:
        made += " ".join(draw.choice(words) for _ in range(1000)) + "\n"
    path.write_text(made)
    return path


def make(shape: str, layers: int | None, folder: Path) -> dict[str, object]:
    from qbench.sources.random import Random

    source, started = Random(shape=shape, layers=layers), time.perf_counter()
    loaded = source.load(torch.bfloat16, torch.device("cuda"), folder)
    loaded.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    loaded.tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"folder_bytes": size, "make_seconds": time.perf_counter() - started}


def ids_of(windows: int) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        content = text(Path(folder), windows).read_bytes()[: windows * WINDOW]
    return torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64).reshape(windows, WINDOW)).cuda()


@torch.no_grad()
def score(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """What a script without anything else does: the NLL of every window, in fp32, window by window."""
    total = 0.0
    for start in range(0, len(ids), BATCH):
        hidden = model.model(ids[start : start + BATCH, :-1], use_cache=False).last_hidden_state
        for row, states in enumerate(hidden):
            logits = model.lm_head(states).float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[start + row, 1:], reduction="sum"))
    return total


def bare(folder: Path, windows: int) -> dict[str, object]:
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    ids = ids_of(windows)
    score(model, ids[:BATCH])
    return {"bare_load_seconds": loaded - started, "bare_forward_seconds": timed(lambda: score(model, ids))}


def timed(run) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def command(folder: Path, windows: int, only: str | None = None) -> dict[str, object]:
    """The wall time of `python -m qbench` itself, imports, hashing and the table included, with nothing recorded."""
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        path = text(here, windows)
        common = [
            "model=local",
            f"model.path={folder}",
            "task=text",
            f"task.path={path}",
            f"task.max_windows={windows}",
        ]
        arguments = [f"quantizer={only}", *common]
        if only is None:
            (here / "mine" / "experiment").mkdir(parents=True)
            product = {"quantizer": ",".join(METHODS), "quantizer.nbits": "4,3"}
            sweeper = {"params": product, "also": [{"quantizer": "none,nf4"}]}
            experiment = "# @package _global_\n" + json.dumps({"hydra": {"sweeper": sweeper}})
            (here / "mine" / "experiment" / "eight.yaml").write_text(experiment)
            arguments = ["--config-dir", str(here / "mine"), "-m", "experiment=eight", *common]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "qbench", *arguments], cwd=here, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        results = [json.loads(p.read_text()) for p in sorted(here.glob("outputs/results/*/result.json"))]
    rows = {
        f"{r['config']['quantizer']['name']}{r['config']['quantizer'].get('nbits', '')}": {
            "seconds": r["seconds"],
            "kl": r["evaluation"][0]["divergence"]["kl"]["value"],
            "peak_alloc_bytes": r["quantization"]["peak_alloc_bytes"],
        }
        for r in results
    }
    return {"command_seconds": seconds, "points": rows}


def shape(name: str, layers: int | None, windows: int, methods: list[str], on_host: bool) -> dict[str, object]:
    """In one process: the bare bf16 forward of a shape if it fits, and a pass over it."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from qbench.config import register
    from qbench.request.prepare import prepare
    from qbench.run import run_pass, walked

    if on_host:
        walked.wait_on_host = lambda *_: True
    register()
    found: dict[str, object] = {"layers": layers, "windows": windows, "states_on_host": on_host}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        path = text(Path(place), windows)
        words = ["model=random", f"model.shape={name}", f"model.layers={layers or 'null'}"]
        words += ["task=text", f"task.path={path}", f"task.max_windows={windows}"]

        def point(quantizer: str):
            with initialize_config_module("qbench.conf", version_base="1.3"):
                config = OmegaConf.to_object(compose("config", [*words, *f"quantizer={quantizer}".split()]))
            return prepare(config, [*words, *f"quantizer={quantizer}".split()])

        points = [point(method) for method in methods]
        if layers is not None:
            source = points[0].model
            model = source.load(torch.bfloat16, torch.device("cuda"), Path(place)).model
            ids = ids_of(windows)
            score(model, ids[:BATCH])
            found["bare_forward_seconds"] = timed(lambda: score(model, ids))
            del model
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started, rows = time.perf_counter(), {}
        for made, result in run_pass(points):
            rows[" ".join(made.command[len(words) :])] = result.seconds | {"error": result.error}
        found |= {"pass_seconds": time.perf_counter() - started, "points": rows}
    found["peak_alloc_bytes"] = torch.cuda.max_memory_allocated()
    found["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def disk(folder: Path) -> dict[str, object]:
    """All weights once through the pass' reader, and once bare, from the page cache in both cases."""
    from safetensors import safe_open

    from qbench.sources.ahead import ahead
    from qbench.sources.folder import Folder

    def read_bare() -> None:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt", device="cuda") as shard:
                for key in shard.keys():  # noqa: SIM118
                    shard.get_tensor(key)

    source = Folder(folder, torch.bfloat16, torch.device("cuda"))

    def read_blocks() -> None:
        with closing(ahead(source.block, range(len(source)), torch.device("cuda"))) as blocks:
            for _ in blocks:
                torch.cuda.current_stream().synchronize()

    def peak_rss() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def anonymous() -> int:
        """Host memory that is no file's page: the system takes those back when it needs them."""
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

    torch.zeros(1, device="cuda")
    before = {"rss_bytes": peak_rss(), "anonymous_bytes": anonymous()}
    read_blocks()
    blocks = [source.bytes_of_block(index) for index in range(len(source))]
    pass_seconds = timed(read_blocks)
    found = {
        "block_bytes": max(blocks),
        "rss_over_start_bytes": peak_rss() - before["rss_bytes"],
        "anonymous_over_start_bytes": anonymous() - before["anonymous_bytes"],
    }
    read_bare()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    speeds = {"bare_bytes_per_second": size / timed(read_bare), "pass_bytes_per_second": sum(blocks) / pass_seconds}
    return {"folder_bytes": size, **speeds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "bare", "command", "point", "shape", "disk"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["rtn", "sinq"], help="as `sinq quantizer.nbits=3`, quoted")
    parser.add_argument("--on-host", action="store_true", help="of `shape`: hidden states wait in pinned host memory")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    runs = {
        "make": lambda: make(asked.shape, asked.layers, asked.folder),
        "bare": lambda: bare(asked.folder, asked.windows),
        "command": lambda: command(asked.folder, asked.windows),
        "point": lambda: command(asked.folder, asked.windows, "rtn"),
        "shape": lambda: shape(asked.shape, asked.layers, asked.windows, asked.methods, asked.on_host),
        "disk": lambda: disk(asked.folder),
    }
    settings = {"what": asked.what, "shape": asked.shape, "windows": asked.windows}
    line = json.dumps({"gpu": torch.cuda.get_device_name(), **settings, **runs[asked.what]()})
    print(line, flush=True)
    if asked.out is not None:
        with asked.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
