"""Loads a model and its tokenizer: from the Hub, a folder, a packed checkpoint, the embedded reference, or a seed.

`fingerprint` identifies the weights without loading them, so that a finished point is recognized in a second.
Only safetensors are read, remote code is never run unless `model.trust_remote_code=true`, and what the Hub
cannot deliver is said in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbench.config import ModelConfig
from qbench.errors import RequestError, unknown
from qbench.models import smollm2, tiny
from qbench.models.experts import QuantExperts
from qbench.models.offload import leave_linears_on_host
from qbench.quant import checkpoint, manifest


@dataclass(frozen=True)
class LoadedModel:
    model: Any  # transformers' causal language model, in eval mode
    tokenizer: Any
    fingerprint: str
    note: str = ""  # what a reader of its numbers must know


def fingerprint(config: ModelConfig) -> str:
    """Identity of the weights, as a short string; raises RequestError when they cannot be found."""
    if config.source == "hub":
        return f"hub:{config.id}@{config.revision}"
    if config.source == "local":
        return f"local:{_hash_folder(_local_folder(config))}"
    if config.source == "smollm2":
        return f"smollm2:{smollm2.GGUF_SHA256[:16]}:v{smollm2.VERSION}:seed{config.seed}"
    if config.source == "random":
        return f"random:{tiny.VERSION}:{config.architecture}:seed{config.seed}"
    if config.source == "packed":
        folder = packed_folder(config)
        manifest.read(folder)
        return f"packed:{hashlib.sha256((folder / manifest.MANIFEST).read_bytes()).hexdigest()[:32]}"
    raise unknown("model.source", config.source, ("hub", "local", "packed", "smollm2", "random"))


def load(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, cache: Path, offload: bool = False
) -> LoadedModel:
    """Loads the model onto `device` in `dtype`; converted models are kept under `cache`.

    With `offload` the linear weights stay in host memory (models/offload.py); a packed checkpoint has none.

    Raises RequestError when the source cannot be read: unknown, unreachable, missing or corrupt.
    """
    identity = fingerprint(config)
    note = ""
    if config.source == "packed":
        folder = packed_folder(config)
        about = manifest.read(folder)["origin"].get("model", {})
        note = f"a packed checkpoint, its original is not here: no baseline. {about.get('note', '')}".strip()
        # a cast of the whole model would reach the stored rotary frequencies: it is made in there
        model = checkpoint.load(folder, dtype, device, {"QuantExperts": lambda old, w: QuantExperts(w, old)})
        return LoadedModel(model, load_tokenizer(config, cache), identity, note)
    if config.source == "random":
        model, tokenizer = tiny.build(config.architecture or "", config.seed)
        for parameter in model.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        note = "seeded random weights: perplexities mean nothing"
    else:
        folder, revision, remote_code = config.id, config.revision, config.trust_remote_code
        if config.source == "local":
            folder, revision = str(_local_folder(config)), None
        elif config.source == "smollm2":
            folder, revision, remote_code = str(smollm2.prepare(cache, config.seed)), None, False
            note = smollm2.NOTE
        if folder is None:
            raise RequestError(f"model={config.name}: model.id is not set; it names the Hub repository")
        model, tokenizer = _from_pretrained(folder, revision, remote_code, dtype)
    model = model.eval().requires_grad_(False)
    if offload:
        leave_linears_on_host(model, device)
    else:
        model = model.to(device)
    return LoadedModel(model, tokenizer, identity, note)


def load_tokenizer(config: ModelConfig, cache: Path) -> Any:
    """The tokenizer alone, so that a text can be checked before gigabytes of weights are read."""
    if config.source == "random":
        return tiny.byte_tokenizer()
    from transformers import AutoTokenizer

    folder, revision = config.id or "", config.revision
    if config.source == "local":
        folder, revision = str(_local_folder(config)), None
    elif config.source == "smollm2":
        folder, revision = str(smollm2.prepare(cache, config.seed)), None
    elif config.source == "packed":
        folder, revision = str(packed_folder(config)), None
        manifest.verify(Path(folder), manifest.read(Path(folder)), weights=False)
    return readable(
        lambda: AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=config.trust_remote_code),
        folder,
    )


def _from_pretrained(folder: str, revision: str | None, remote_code: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"revision": revision, "trust_remote_code": remote_code, "local_files_only": Path(folder).is_dir()}
    tokenizer = readable(lambda: AutoTokenizer.from_pretrained(folder, **common), folder)
    model = readable(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **common), folder
    )
    return model, tokenizer


def readable(read: Callable[[], Any], folder: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    try:
        return read()
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(folder).is_dir():
            raise RequestError(
                f"cannot read a model from {folder}: {first_line.rstrip('.')}. It must hold config.json, a tokenizer "
                "and intact *.safetensors files, as save_pretrained writes them"
            ) from error
        raise RequestError(
            f"cannot get {folder} from the Hugging Face Hub: {first_line.rstrip('.')}. Without network use "
            "model=smollm2-135m (embedded) or model=local model.path=DIR"
        ) from error


def packed_folder(config: ModelConfig) -> Path:
    if not config.path:
        raise RequestError(f"model={config.name} needs model.path=DIR, a packed checkpoint written by export.dir=DIR")
    return Path(config.path).expanduser()


def _local_folder(config: ModelConfig) -> Path:
    if not config.path:
        raise RequestError(f"model={config.name} needs model.path=DIR, a folder with config.json and *.safetensors")
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise RequestError(f"model.path={config.path} is not a folder; it must hold config.json and *.safetensors")
    if (folder / manifest.MANIFEST).is_file():
        raise RequestError(f"model.path={folder} is a packed checkpoint: use model=packed model.path={folder}")
    if not (folder / "config.json").is_file():
        raise RequestError(f"model.path={folder} has no config.json; is it a folder written by save_pretrained?")
    if not list(folder.glob("*.safetensors")):
        raise RequestError(f"model.path={folder} has no *.safetensors file; other weight formats are not read")
    return folder


def _hash_folder(folder: Path) -> str:
    """sha256 over the names and contents of what defines the model: configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model", ".txt"))
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()[:32]
