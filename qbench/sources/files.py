"""A model's folder as save_pretrained writes it: which of its files define the model, and whether it can be measured.

That is seen from config.json and the names of the files, before a weight is read or, from the Hub, fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qbench.errors import RequestError
from qbench.sources import hashes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# configuration, tokenizers of every kind and chat templates, also those in additional_chat_templates/
SETTINGS = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja")
# what training leaves behind, and what is written for people
BESIDE = (
    *("trainer_state.json", "training_args*", "*results.json", "optimizer*", "scheduler*", "rng_state*"),
    *("README*", "LICENSE*", "USE_POLICY*", "requirements*.txt"),
)


class ModelError(RequestError):
    """Configuration or headers say that no point of this model can run."""


def check_config(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Raises ModelError when the folder's config.json says that its model cannot be measured as it is."""
    config = _read_json(folder / "config.json")
    if found := quantized_as(config):
        raise ModelError(
            f"{name} is quantized already ({found}), and what is compared here starts from weights in 16 or 32 bits: "
            "name the checkpoint that it was made of, or one that was dequantized and saved anew; a checkpoint that "
            "export.dir packed runs with model=packed"
        )
    if not trust_remote_code and _needs_code(config):
        raise code_refused(name)


def code_refused(name: str) -> ModelError:
    return ModelError(
        f"{name} is only read by Python code that comes with it; once you have read and trust that code, say "
        "model.trust_remote_code=true"
    )


def quantized_as(config: Mapping[str, Any]) -> str | None:
    """The format in which config.json says that the weights are quantized, as `gptq 4 bit`; None if they are not.

    transformers and most others write `quantization_config`, for a multimodal model in a part of it; older
    compressed-tensors write `compression_config` and MLX writes `quantization`.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(found := part.get(key), Mapping) and found:
                bits = found.get("bits") or found.get("w_bit") or found.get("nbits")
                if found.get("load_in_8bit") or found.get("_load_in_8bit"):
                    bits = 8
                elif found.get("load_in_4bit") or found.get("_load_in_4bit"):
                    bits = 4
                method = str(found.get("quant_method") or ("mlx" if key == "quantization" else "a format without name"))
                return f"{method} {bits} bit" if bits else method
    return None


def weight_files(folder: Path, name: str, present: bool = True) -> list[str]:
    """The *.safetensors files that hold the weights, which transformers looks for under just these names.

    Raises RequestError when there is none or, unless `present` is False, when one of them is missing.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / WEIGHTS).is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
            raise RequestError(f"{index} names no file of weights; it must have a weight_map from tensors to files")
        files = sorted(set(shards.values()))
    else:
        files = [WEIGHTS]
    if missing := [file for file in files if present and not (folder / file).is_file()]:
        if missing == [WEIGHTS]:
            others = f", only {o[0]}" if (o := sorted(p.name for p in folder.glob("*.safetensors"))) else ""
            raise RequestError(
                f"{name} has no *.safetensors file of the name {WEIGHTS} or in a {INDEX}{others}; other weight formats "
                "are not read"
            )
        raise RequestError(f"{name} lacks {len(missing)} of {len(files)} files of weights, first {missing[0]}")
    return files


def fingerprint(folder: Path) -> str:
    """sha256 over names and contents of what defines the model, 32 hex digits.

    Configuration, tokenizer, the weights that are read and, where the model brings code of its own, that code. What is
    remembered of a file is not read again (hashes.py).
    """
    digest, paths = hashlib.sha256(), sorted(_defining(folder))
    for path, content in zip(paths, hashes.sha256_of(paths), strict=True):
        digest.update(json.dumps([path.relative_to(folder).as_posix(), content]).encode())
    return digest.hexdigest()[:32]


def settings(folder: Path) -> list[Path]:
    """Configuration and tokenizer, in the order of the alphabet."""
    found = (*folder.iterdir(), *folder.glob("additional_chat_templates/*"))
    return sorted(
        path
        for path in found
        if any(fnmatch(path.name, p) for p in SETTINGS) and not any(fnmatch(path.name, p) for p in BESIDE)
    )


def _defining(folder: Path) -> Iterator[Path]:
    yield from settings(folder)
    yield from (folder / file for file in weight_files(folder, str(folder)))
    if any("auto_map" in _read_json(path) for path in folder.glob("*config.json")):
        yield from (path for path in folder.rglob("*.py") if path.is_file())


def _needs_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers has no class of its own for this configuration, or none for its language model."""
    own = config.get("auto_map") or {}
    if not own:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    return ("AutoConfig" in own and kind not in CONFIG_MAPPING_NAMES) or (
        "AutoModelForCausalLM" in own and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read a model from {path.parent}: {path.name}: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(f"cannot read a model from {path.parent}: {path.name} holds no JSON object")
    return content
