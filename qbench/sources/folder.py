"""A model in a folder, as save_pretrained writes it: all but its blocks at once, and a block at a time.

    source = Folder(path, dtype, device)    reads configuration and headers, and checks that they fit each other
    model = source.rest()                   embedding, rotary, norm and head are real, the blocks on the meta device
    block = source.block(17)                a module of its own, its weights on the device

Weights go through transformers' own conversion, which fuses a mixture's experts while loading: it is given one block's
tensors, not yet read, and a model on the meta device. So every tensor has the bits that from_pretrained gives it. The
check is the same conversion of tensors on the meta device that have the headers' names and shapes: what is missing,
unexpected or of the wrong shape is known before a byte of weights is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench.errors import PointError, RequestError
from qbench.model.blocks import block_of, find_blocks
from qbench.readers.shards import Lazy, Shards
from qbench.sources import files, skeleton
from qbench.sources.complete import require_complete, require_floats
from qbench.sources.stream import assembled


class Folder:
    """A stream (stream.py) of weights in `dtype` on `device`, from a folder that errors call `name`.

    Raises RequestError when the folder is no complete model, or one that is quantized already, and NotAChainError for a
    model without a list of blocks of their own.
    """

    resident = False

    def __init__(
        self, path: Path | str, dtype: torch.dtype, device: torch.device, name: str | None = None, note: str = ""
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.path, self.dtype, self.device, self.note = Path(path), dtype, torch.device(device), note
        self.name = name or str(path)
        self.shards = Shards(self.path)
        self._skeleton = _skeleton(self.path, dtype, self.name)  # weights pass through it, one block at a time
        self.prefix, self._blocks = find_blocks(self._skeleton)
        self._mapping = get_model_conversion_mapping(self._skeleton)
        self._plan = self._skeleton._get_dtype_plan(dtype)  # what stays in fp32 whatever is asked for
        self._keys = self._by_block()
        self._check()

    def __len__(self) -> int:
        return len(self._blocks)

    def bytes_of_block(self, i: int | None) -> int:
        """What block `i` takes on disk; None: all that lies outside of the blocks."""
        return sum(self.shards.tensors[key].nbytes for key in self._keys[i])

    def rest(self) -> Any:
        """The model in eval mode, all but its blocks loaded, with the settings that from_pretrained gives it.

        Its blocks stay on the meta device.
        """
        model = skeleton.copy_of(self._skeleton, self._skeleton)
        info = self._load(model, self._keys[None])
        model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        for name, module in model.named_modules():
            if block_of(f"{name}.", self.prefix) is None:
                skeleton.initialize(model, name, module, self.device)
        model.config.name_or_path = str(self.path)
        if model.can_generate() and hasattr(model, "adjust_generation_fn"):  # what generation_config.json says
            absent = dict.fromkeys(("cache_dir", "proxies", "token"))
            here = dict(local_files_only=True, force_download=False, revision="main", subfolder="")
            model.adjust_generation_fn(None, True, None, self.path, **absent, **here, trust_remote_code=False)
        return model.eval().requires_grad_(False)

    def block(self, i: int) -> nn.Module:
        """Block `i` in eval mode, loaded; nobody else holds it. One thread at a time.

        On CUDA its tensors are filled by the current stream, in whose memory they are. Raises PointError when a shard
        cannot be read any more.
        """
        fresh, name = skeleton.copy_of(self._blocks[i], self._skeleton), f"{self.prefix}.{i}"
        try:
            self._load(self._skeleton, self._keys[i])
            for inner, module in self._blocks[i].named_modules(prefix=name):
                skeleton.initialize(self._skeleton, inner, module, self.device)
            return self._blocks[i].eval().requires_grad_(False)
        finally:
            self._blocks[i] = self._skeleton.get_submodule(self.prefix)[i] = fresh

    def _load(self, model: Any, keys: Iterable[str], device: torch.device | None = None) -> Any:
        """Converts what the shards hold under `keys` into the model's weights; `device` meta reads nothing.

        Raises PointError for a weight that cannot be made of what is stored; of `device` meta, that is in the report.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        device = device or self.device
        values = {key: self._value(key, device) for key in keys}
        config = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=self._plan, device_map={"": device}, weight_mapping=self._mapping
        )
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(model, values, config)
        if info.conversion_errors and device.type != "meta":
            raise PointError(f"{self.name}: {_not_made(info)}")
        return info

    def _value(self, key: str, device: torch.device) -> Any:
        if device.type != "meta":
            return Lazy(self.shards, key, device)
        stored = self.shards.tensors[key]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def _by_block(self) -> dict[int | None, list[str]]:
        """The shards' keys by the block that they end up in; None: outside of the blocks.

        Raises ModelError when those of the model's weights hold codes.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        wanted, base = self._skeleton.state_dict(), self._skeleton.base_model_prefix
        weights = {name for name, _ in self._skeleton.named_parameters(remove_duplicate=False)}
        dtypes: set[torch.dtype] = set()  # of those, as stored
        keys: dict[int | None, list[str]] = defaultdict(list)
        for key in self.shards.tensors:
            name, _ = rename_source_key(key, renamings, converters, base, wanted)
            if name not in wanted and key in wanted:
                name = key  # as the conversion does
            keys[block_of(name, self.prefix) if name in wanted else None].append(key)
            dtypes |= {self.shards.tensors[key].dtype} if name in weights else set()
        require_floats(dtypes, self.name)
        return keys

    def _check(self) -> None:
        """Raises RequestError unless the headers' names and shapes make this model, no more and no less.

        Of blocks that are alike, in the headers and in the model, one is converted: a mixture has tens of thousands of
        tensors, at a fraction of a millisecond each.
        """
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, block in enumerate(self._blocks):
            wanted = tuple((name, tensor.shape) for name, tensor in block.state_dict().items())
            alike[wanted, self._stored(i)].append(i)
        members: dict[int | None, list[int]] = {blocks[0]: blocks for blocks in alike.values()}

        def everywhere(key: str) -> list[str]:
            if (i := block_of(key, self.prefix)) is None:
                return [key]
            return [f"{self.prefix}.{j}{key.removeprefix(f'{self.prefix}.{i}')}" for j in members[i]]

        keys = [key for i in (None, *members) for key in self._keys[i]]
        info = self._load(self._skeleton, keys, torch.device("meta"))
        info.missing_keys = {key for key in info.missing_keys if block_of(key, self.prefix) in (None, *members)}
        for tied, source in self._skeleton.all_tied_weights_keys.items():
            if not {tied, source} <= info.missing_keys:
                info.missing_keys -= {tied, source}
        self._skeleton._adjust_missing_and_unexpected_keys(info)  # removes what the model says may be ignored
        report = {
            "missing_keys": [n for key in info.missing_keys - {*info.conversion_errors} for n in everywhere(key)],
            "unexpected_keys": info.unexpected_keys,
            "mismatched_keys": [(name, *shapes) for key, *shapes in info.mismatched_keys for name in everywhere(key)],
            "error_msgs": [_not_made(info)] if info.conversion_errors else [],
        }
        require_complete(self._skeleton, report, self.name)
        self._try_buffers([None, *members])

    def _try_buffers(self, numbers: list[int | None]) -> None:
        """Raises NotAChainError for a buffer of these blocks, or outside of them, that only the whole model makes."""
        for name, module in self._skeleton.named_modules():
            stored_nowhere = module._non_persistent_buffers_set
            if stored_nowhere and block_of(f"{name}.", self.prefix) in numbers:
                alone = skeleton.copy_of(module, self._skeleton)
                skeleton.initialize(self._skeleton, name, alone, torch.device("cpu"), stored_nowhere)

    def _stored(self, i: int) -> frozenset:
        """What the headers tell of block `i`, its number taken out of the names."""
        number = re.compile(rf"(^|\.){i}\.")
        return frozenset(
            (number.sub(".*.", key, count=1), self.shards.tensors[key].shape, self.shards.tensors[key].dtype)
            for key in self._keys[i]
        )


def straight(path: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any | None:
    """The whole model of a folder without a way through host memory, or None where from_pretrained is to be asked.

    That is for what is no list of blocks of their own (Zamba2), and for whatever Folder refuses: transformers reads it
    after all, or the sentence about it is made from its report. Raises ModelError for one that is quantized already,
    and PointError when the device has no room, or when a file changes meanwhile.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        stream = Folder(path, dtype, device, name)
    except files.ModelError:
        raise
    except Exception:  # nothing is read yet but headers, and from_pretrained says what is wrong
        return None
    return assembled(stream)


def _skeleton(path: Path, dtype: torch.dtype, name: str) -> Any:
    """The model on the meta device; raises RequestError when the configuration makes none."""
    from transformers import AutoConfig

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                method = dict(config.quantization_config).get("quant_method", "an unknown method")
                raise RequestError(f"{name} is quantized already, with {method}: it has no 16-bit weights to read")
            return skeleton.make(config, dtype, trust_remote_code=False)
    except RequestError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise files.code_refused(name) from None
        raise RequestError(
            f"cannot read a model from {name}: its config.json makes no causal language model: {first_line(error)}"
        ) from error


def _not_made(info: Any) -> str:
    key, error = next(iter(info.conversion_errors.items()))
    return f"{key} cannot be made of the tensors stored for it: {_last_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars: one block is no progress to speak of."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error says first, for a sentence that goes on."""
    return re.sub(r"\s+", " ", (str(error).strip().splitlines() or [type(error).__name__])[0])[:200].rstrip(".")


def _last_line(text: str) -> str:
    return (str(text).strip().splitlines() or ["unknown"])[-1][:200]
