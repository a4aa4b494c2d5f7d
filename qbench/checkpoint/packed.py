"""Packed checkpoints: a quantized model as a folder that needs neither the original weights nor the quantizer.

    config.json, tokenizer files      as save_pretrained writes them; generation_config.json too (settings.py)
    model-00001-of-00002.safetensors  packed buffers and every other tensor under its name in the model, tied ones once
    qbench.json                       format, version, each quantized layer, and the sha256 of every other file

Every tensor is stored, non-persistent buffers such as rotary frequencies too: a loaded model has nothing left to
compute and gives the very logits that were measured. The folder is written beside its place and renamed into it, so
it is complete or absent. Reading checks every hash first; nothing is unpickled and no code of the folder is run.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qbench.checkpoint import settings
from qbench.checkpoint.manifest import FORMAT, MANIFEST, VERSION, entry, file_sha256, read, rebuild, seal, verify
from qbench.errors import RequestError
from qbench.format.format import Format
from qbench.layers.linear import QuantLinear, in_packed_format, packed_weights
from qbench.quant.quantizer import Quantizer
from qbench.record.disk import refusal

PARTIAL = ".partial-"
Builder = Callable[[nn.Module, list[Format]], nn.Module]  # from the module it replaces and its weights
SHARD_BYTES = 4 * 2**30


def check_target(
    folder: Path,
    run_id: str | None = None,
    origin_of: Callable[[Path], Mapping[str, Any]] = lambda folder: read(folder)["origin"],
    kind: str = "packed checkpoint",
) -> None:
    """Raises RequestError when `save` could not put a checkpoint at `folder`; creates nothing.

    With `run_id`, the checkpoint of another point counts as occupied too: a sweep must not overwrite its own points.
    `origin_of` reads what a checkpoint of this `kind` was made of, or raises RequestError if the folder holds none.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a new folder for the checkpoint")
    if (reason := refusal(folder.parent)) is not None:
        raise RequestError(f"cannot write a checkpoint to {folder}: {reason}")
    try:
        occupied = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise RequestError(f"cannot write a checkpoint to {folder}: {error.strerror}") from None
    if not occupied:
        return
    try:
        other = origin_of(folder).get("run_id")
    except RequestError:
        raise RequestError(
            f"{folder} is not empty and holds no {kind}; name another folder or empty this one"
        ) from None
    if run_id is not None and other != run_id:
        raise RequestError(
            f"{folder} holds the checkpoint of another point ({other}); name another folder or remove this one. In a "
            "sweep use '${quantizer.name}' and '${quantizer.nbits}' in the name"
        )


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes the quantized `model` to `folder`, replacing a checkpoint that is already there.

    `origin` is kept as it is: what the model was made of and how. Raises RequestError, and leaves what was there, when
    the folder is occupied or cannot be written, or when a module holds packed buffers in a way this version cannot
    restore.
    """
    check_target(folder)
    # what is stored is the packed format, not the layout of a GPU's kernels
    with in_packed_format(model), new_folder(folder) as partial:
        layers = _layers(model)
        tensors, tied = _unique_tensors(model)
        settings.write(model, tokenizer, partial)
        write_shards(tensors.items(), partial, max_shard_bytes)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "config": "config.json",
            "origin": dict(origin or {}),
            "layers": layers,
            "tied": tied,
            "files": {path.relative_to(partial).as_posix(): file_sha256(path) for path in _files(partial)},
        }
        (partial / MANIFEST).write_text(json.dumps(seal(manifest), indent=1) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Hands out an empty folder beside `folder` and puts it in its place at the end: complete, or not at all.

    What fails to be written becomes a RequestError; whatever is raised, `folder` stays as it was.
    """
    partial = folder.parent / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in _files(partial):
            _flush(path)
        _move_into_place(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot write the checkpoint to {folder}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    builders: Mapping[str, Builder] | None = None,
) -> Any:
    """The model of a checkpoint, in eval mode, on `device`; without `dtype` as saved, to the bit.

    `builders` make the kinds of module other than QuantLinear. With `dtype` the parameters are cast; packed buffers
    and other buffers keep their stored precision. Raises RequestError naming the file that is missing, damaged or
    foreign.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    manifest = read(folder)
    verify(folder, manifest)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever comes to hand for a configuration it does not know
        raise RequestError(f"{folder / 'config.json'}: no model can be built from it: {error}") from error
    tensors = _read_shards(folder, manifest, device)
    try:
        for name, layer in manifest["layers"].items():
            parent, _, child = name.rpartition(".")
            try:
                weights = [rebuild(w, _under(tensors, f"{name}.{prefix}")) for prefix, w in layer["weights"].items()]
            except RequestError as error:
                raise RequestError(f"{folder / MANIFEST}: {name}: {error}") from None
            if layer["kind"] == "QuantLinear":
                module = QuantLinear(*weights, bias=tensors.get(f"{name}.bias"))
            elif layer["kind"] in (builders or {}):
                module = builders[layer["kind"]](model.get_submodule(name), weights)
            else:
                raise RequestError(f"{folder / MANIFEST}: {name} is a {layer['kind']}, which is not known here")
            setattr(model.get_submodule(parent), child, module)
        _fill(model, tensors, manifest["tied"], dtype)
        settings.read_generation(model, folder)
    except RequestError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RequestError(f"{folder / MANIFEST} does not describe the model of config.json: {error}") from error
    return model.eval().requires_grad_(False)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Module name -> kind and weights by buffer prefix; a module that packs weights and does not say so is refused."""
    layers: dict[str, Any] = {}
    described: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "packed"):
            weights = module.packed()
            layers[name] = {
                "kind": type(module).__name__,
                "weights": {prefix: entry(weight) for prefix, weight in weights.items()},
            }
            described |= {f"{name}.{prefix}".rstrip(".") for prefix in weights}
    for name in packed_weights(model):
        if name not in described:
            holder = name.rpartition(".")[0]
            kind = type(model.get_submodule(holder)).__name__
            raise RequestError(f"{holder} ({kind}) holds packed weights that cannot be exported yet")
    if not layers:
        raise RequestError("the model has no quantized layer; save_pretrained is the way to save it")
    return layers


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer once, and alias -> name for those that the model holds under several names."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if (known := first.setdefault(id(tensor), name)) == name:
                tensors[name] = tensor.detach()
            else:
                tied[name] = known
    return tensors, tied


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> dict[str, dict[str, int]]:
    """Fills one file after the other up to `max_bytes`; a single larger tensor gets a file of its own.

    Returns the bytes of each tensor by file. Only one file's tensors are held at a time.
    """
    written: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}
    filled = 0

    def write() -> None:
        written.append({name: tensor.nbytes for name, tensor in shard.items()})
        save_file(shard, folder / f"model-{len(written):05d}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_bytes:
            write()
            filled = 0
        filled += tensor.nbytes
        content = tensor.cpu().contiguous()
        # safetensors refuses views of one storage
        shard[name] = content if content.untyped_storage().nbytes() == content.nbytes else content.clone()
    write()
    files = {}
    for i, sizes in enumerate(written, 1):  # how many there are is known only now
        file = f"model-{i:05d}-of-{len(written):05d}.safetensors"
        (folder / f"model-{i:05d}.safetensors").rename(folder / file)
        files[file] = sizes
    return files


def _read_shards(folder: Path, manifest: Mapping[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt", device=str(device)) as file:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            except (SafetensorError, OSError) as error:
                raise RequestError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _fill(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], dtype: torch.dtype | None) -> None:
    """Puts the stored tensors where the model holds empty ones; raises KeyError unless they match one to one."""
    expected = set(dict(model.named_parameters(remove_duplicate=False)))
    expected |= set(dict(model.named_buffers(remove_duplicate=False)))
    if difference := expected ^ (tensors.keys() | tied.keys()):
        raise KeyError(f"{len(difference)} tensors differ, first {min(difference)}")
    made: dict[str, Tensor] = {}
    for name in [*tensors, *tied]:
        owner, _, key = name.rpartition(".")
        module, source = model.get_submodule(owner), tied.get(name, name)
        is_parameter = key in module._parameters
        if source not in made:
            tensor = tensors[source]
            if is_parameter:
                cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
                tensor = nn.Parameter(cast, requires_grad=False)
            made[source] = tensor
        (module._parameters if is_parameter else module._buffers)[key] = made[source]


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = partial.with_name(f"{partial.name}-old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush(path: Path) -> None:
    path.chmod(0o644)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Packed:
    """export.format=packed: holds what any method makes, and model=packed reads it back."""

    def refuse(self, quantizer: Quantizer) -> str | None:
        return None

    def refuse_model(self, model: Any, quantizer: Quantizer) -> str | None:
        return None

    def check_target(self, folder: Path, run_id: str | None = None) -> None:
        check_target(folder, run_id)

    def save(self, model: Any, tokenizer: Any, folder: Path, origin: Mapping[str, Any]) -> None:
        save(model, tokenizer, folder, origin=origin)
