"""Loads a model and its tokenizer: from the Hub, a folder, a packed checkpoint, the embedded reference, or a seed.

`fingerprint` identifies the weights without loading them, so that a finished point is recognized in a second.
Only safetensors are read, remote code is never run unless `model.trust_remote_code=true`, a checkpoint that does not
hold just the model of its configuration is refused, and what the Hub cannot deliver is said in one sentence.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbench.checkpoint import manifest
from qbench.checkpoint import packed as checkpoint
from qbench.config import ModelConfig
from qbench.errors import RequestError, unknown
from qbench.layers.experts import QuantExperts
from qbench.model.offload import leave_linears_on_host
from qbench.sources import files as folder
from qbench.sources import hub, smollm2, tiny
from qbench.sources.complete import NOTHING_AMISS, require_complete
from qbench.sources.folder import straight


@dataclass(frozen=True)
class LoadedModel:
    model: Any  # transformers' causal language model, in eval mode
    tokenizer: Any
    fingerprint: str
    note: str = ""  # what a reader of its numbers must know


def fingerprint(config: ModelConfig) -> str:
    """Identity of the weights, as a short string; raises RequestError when they cannot be found or measured."""
    if config.source == "hub":
        return f"hub:{config.id}@{hub.pinned(config).revision}"
    if config.source == "local":
        return f"local:{folder.fingerprint(folder.local(config))}"
    if config.source == "smollm2":
        return f"smollm2:{smollm2.GGUF_SHA256[:16]}:v{smollm2.VERSION}:seed{config.seed}"
    if config.source == "random":
        return f"random:{tiny.VERSION}:{config.architecture}:seed{config.seed}"
    if config.source == "packed":
        place = packed_folder(config)
        manifest.read(place)
        return f"packed:{hashlib.sha256((place / manifest.MANIFEST).read_bytes()).hexdigest()[:32]}"
    raise unknown("model.source", config.source, ("hub", "local", "packed", "smollm2", "random"))


def load(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path,
    offload: bool = False,
    identity: str | None = None,
) -> LoadedModel:
    """Loads the model onto `device` in `dtype`; converted models are kept under `cache`.

    With `offload` the linear weights stay in host memory (models/offload.py); a packed checkpoint has none. `identity`
    is the model's fingerprint where it is known already: a large folder takes minutes to hash.

    Raises RequestError when the source cannot be read: unknown, unreachable, missing, corrupt, or not the model that
    its configuration describes.
    """
    identity = identity or fingerprint(config)
    note = ""
    if config.source == "packed":
        place = packed_folder(config)
        about = manifest.read(place)["origin"].get("model", {})
        note = f"a packed checkpoint, its original is not here: no baseline. {about.get('note', '')}".strip()
        # a cast of the whole model would reach the stored rotary frequencies: it is made in there
        model = checkpoint.load(place, dtype, device, {"QuantExperts": lambda old, w: QuantExperts(w, old)})
        return LoadedModel(model, load_tokenizer(config, cache), identity, note)
    if config.source == "random":
        model, tokenizer = tiny.build(config.architecture or "", config.seed)
        for parameter in model.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        note = "seeded random weights: perplexities mean nothing"
    else:
        tokenizer = load_tokenizer(config, cache)
        model = _from_pretrained(config, _folder(config, cache, weights=True), dtype, None if offload else device)
        note = smollm2.NOTE if config.source == "smollm2" else ""
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

    place = _folder(config, cache, weights=False)
    return readable(
        lambda: AutoTokenizer.from_pretrained(
            place, trust_remote_code=config.trust_remote_code, local_files_only=not config.trust_remote_code
        ),
        place,
        _name(config, place),
    )


def _from_pretrained(config: ModelConfig, place: Path, dtype: torch.dtype, device: torch.device | None) -> Any:
    """The model, straight to `device` where that can be done (folder.py), else on the CPU; None: on the CPU."""
    from transformers import AutoModelForCausalLM

    name = _name(config, place)
    if device is not None and not config.trust_remote_code:
        model = straight(place, dtype, device)
        if model is not None:
            require_complete(model, NOTHING_AMISS, name)
            return model
    model, report = readable(
        lambda: AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            local_files_only=not config.trust_remote_code,  # a model's code may lie in another repository
            ignore_mismatched_sizes=True,  # they are in the report, with their names
            output_loading_info=True,
        ),
        place,
        name,
    )
    require_complete(model, report, name)
    return model


def _folder(config: ModelConfig, cache: Path, weights: bool) -> Path:
    """Where the files of a model lie; from the Hub, they are fetched."""
    if config.source == "hub":
        return hub.weights(config) if weights else hub.settings(config)
    if config.source == "local":
        return folder.local(config)
    if config.source == "smollm2":
        return smollm2.prepare(cache, config.seed)
    if config.source == "packed":
        place = packed_folder(config)
        manifest.verify(place, manifest.read(place), weights=False)
        return place
    raise unknown("model.source", config.source, ("hub", "local", "packed", "smollm2", "random"))


def _name(config: ModelConfig, place: Path) -> str:
    return config.id or str(place) if config.source == "hub" else str(place)


def readable(read: Callable[[], Any], place: Path, name: str) -> Any:
    """What `read` reads from the folder `place`; whatever it raises becomes a RequestError about `name`."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what fails is said once, below
    try:
        return read()
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise folder.code_refused(name) from None
        if package := _missing_package(error, place):
            raise RequestError(
                f"the tokenizer of {name} is only read by the package {package}; install it with: pip install {package}"
            ) from error
        first_line = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(
            f"cannot read a model from {name}: {first_line.rstrip('.')}. It must hold config.json, a tokenizer "
            "and intact *.safetensors files, as save_pretrained writes them"
        ) from error


def _missing_package(error: Exception, place: Path) -> str | None:
    """The package that a tokenizer without tokenizer.json needs; transformers may name another that it tried last."""
    if not isinstance(error, ImportError | ValueError) or (place / "tokenizer.json").is_file():
        return None
    needed = [("sentencepiece", "*.model"), ("protobuf", "*.model"), ("tiktoken", "*.tiktoken")]
    modules = {"protobuf": "google.protobuf"}
    for package, files in needed:
        if list(place.glob(files)) and _absent(modules.get(package, package)):
            return package
    return None


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of the package around it
        return True


def packed_folder(config: ModelConfig) -> Path:
    if not config.path:
        raise RequestError(f"model={config.name} needs model.path=DIR, a packed checkpoint written by export.dir=DIR")
    return Path(config.path).expanduser()
