"""Reads a model's folder through transformers: tokenizer, configuration, weights; what it cannot read is one sentence.

Only safetensors are read, remote code is never run unless it is trusted, and a folder that does not hold just the
model of its configuration is refused.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qbench.errors import RequestError
from qbench.model.blocks import NotAChainError
from qbench.model.offload import leave_linears_on_host
from qbench.sources import files
from qbench.sources.complete import require_complete
from qbench.sources.folder import Folder, first_line, straight
from qbench.sources.stream import Stream

log = logging.getLogger(__name__)


def read_tokenizer(place: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the folder `place`, which errors call `name`; raises RequestError if it cannot be read."""
    from transformers import AutoTokenizer

    return readable(
        lambda: AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        ),
        place,
        name,
    )


def read_configuration(place: Path, name: str, trust_remote_code: bool = False) -> Any:
    """As `read_tokenizer`, transformers' configuration."""
    from transformers import AutoConfig

    return readable(lambda: AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code), place, name)


def read_model(
    place: Path, name: str, dtype: torch.dtype, device: torch.device, offload: bool, trust_remote_code: bool = False
) -> Any:
    """As `read_tokenizer`, the model as `settled` leaves it; raises RequestError if it is not that of its config.json.

    Its weights go straight to `device` where that can be done (folder.py), else through host memory.
    """
    if not (offload or trust_remote_code) and (model := straight(place, name, dtype, device)) is not None:
        return settled(model, device, offload)
    return settled(_through_host(place, name, dtype, trust_remote_code), device, offload)


def read_stream(
    place: Path,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    note: str = "",
) -> Stream | None:
    """As `read_model`, the model a block at a time; None where it is only to be had whole, as one with code of its own.

    No byte of a weight is read before its sentence is said of a folder that lacks a tensor or holds a broken file.
    """
    import transformers

    if trust_remote_code:
        return None
    transformers.logging.set_verbosity_error()
    read_configuration(place, name)  # for its sentence
    try:
        return Folder(place, dtype, device, name, note)
    except NotAChainError:
        return None
    except RequestError:
        raise
    except (
        Exception
    ) as error:  # an architecture that is read in a way of its own: loading knows it, or says what is wrong
        log.warning("%s is read whole and not block by block: %s: %s", name, type(error).__name__, first_line(error))
        return None


def _through_host(place: Path, name: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = readable(
        lambda: AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=not trust_remote_code,  # a model's code may lie in another repository
            ignore_mismatched_sizes=True,  # they are in the report, with their names
            output_loading_info=True,
        ),
        place,
        name,
    )
    require_complete(model, report, name)
    return model


def settled(model: Any, device: torch.device, offload: bool) -> Any:
    """The model in eval mode, without gradients, on `device`; with `offload`, but for its linear weights."""
    model = model.eval().requires_grad_(False)
    if offload:
        leave_linears_on_host(model, device)
        return model
    return model.to(device)


def without_storage(about: Callable[[], Any], trust_remote_code: bool = False) -> Any | None:
    """The model of the configuration that `about` reads, on the meta device; None if that is not to be had.

    Raises ModelError when the configuration says that no point of the model can run.
    """
    from transformers import AutoModelForCausalLM

    trust = {"trust_remote_code": trust_remote_code}  # unsaid, transformers asks on stdin
    try:
        found = about()
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, **trust)
    except files.ModelError:
        raise
    except Exception:  # no network, no such model: the point itself will say what is wrong
        return None


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
            raise files.code_refused(name) from None
        if package := _missing_package(error, place):
            raise RequestError(
                f"the tokenizer of {name} is only read by the package {package}; install it with: pip install {package}"
            ) from error
        raise RequestError(
            f"cannot read a model from {name}: {first_line(error)}. It must hold config.json, a tokenizer "
            "and intact *.safetensors files, as save_pretrained writes them"
        ) from error


def _missing_package(error: Exception, place: Path) -> str | None:
    """The package that a tokenizer without tokenizer.json needs; transformers may name another that it tried last."""
    if not isinstance(error, ImportError | ValueError) or (place / "tokenizer.json").is_file():
        return None
    needed = [("sentencepiece", "*.model"), ("protobuf", "*.model"), ("tiktoken", "*.tiktoken")]
    modules = {"protobuf": "google.protobuf"}
    for package, patterns in needed:
        if list(place.glob(patterns)) and _absent(modules.get(package, package)):
            return package
    return None


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of the package around it
        return True
