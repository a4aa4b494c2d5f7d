"""Where a GGUF file has each weight of a transformers model, and what llama.cpp's conversion did to it.

The names are those that the package gguf maps from transformers' own. A stack of experts gives an entry for each
matrix of each expert, as rows of the stack. Shapes are compared before anything is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.format.gguf import GGUFLatent, of_blocks
from qbench.layers.expert_form import form, refusal, stacked_parameters
from qbench.model.gguf_names import ARCHITECTURES, INTERLEAVED, NORMS_PLUS_ONE, tensor_names
from qbench.readers.gguf_file import Header, Stored
from qbench.readers.reader import Entry, ReadError

ROTARY = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a stored tensor; all of them unless said otherwise."""

    stored: Stored
    start: int = 0
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes // self.stored.rows * (self.stored.rows if self.rows is None else self.rows)

    def format(self) -> Format:
        return of_blocks(self.stored.type, self.stored.read(self.start, self.rows), self.stored.type)


@dataclass(frozen=True)
class Weight:
    """Where one of the model's weights lies, and what was done to it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # one, but of a `change` that joins several
    change: str = ""  # "", rows, norm, latent, taking turns, one after the other
    heads: int = 0  # of a change that needs their number

    def entry(self) -> Entry:
        kinds = dict.fromkeys(piece.stored.type for piece in self.pieces)
        quantized = any(piece.stored.quantized for piece in self.pieces)
        return Entry(self.shape, " and ".join(kinds), sum(piece.nbytes for piece in self.pieces), quantized)


def located(header: Header, model: Any) -> tuple[dict[str, Weight], dict[str, str]]:
    """The model's weights in the file, and the tensors that it has no place for with the reason.

    Raises ReadError unless the file is one of this model's architecture, shapes and vocabulary, complete.
    """
    config = model.config.get_text_config()
    _require_architecture(header, config)
    weights, absent = {}, []
    for name, shape, found in _wanted(header, model, config):
        if found is None:
            absent.append(name)
        else:
            weights[name] = _fitting(header, name, shape, found)
    if absent:
        names = ", ".join(absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")
        raise ReadError(f"{header.path.name} lacks {len(absent)} of the model's tensors: {names}")
    used = {piece.stored.name for weight in weights.values() for piece in weight.pieces}
    ignored, foreign = {}, []
    for name in header.tensors.keys() - used:
        if reason := _may_be_left(name, header, config, used):
            ignored[name] = reason
        else:
            foreign.append(name)
    if foreign:
        raise ReadError(
            f"{header.path.name} holds {len(foreign)} tensors that the model has no place for, the first is "
            f"{min(foreign)}: it is another model's file"
        )
    return weights, dict(sorted(ignored.items()))


def _require_architecture(header: Header, config: Any) -> None:
    file, kind = header.path.name, config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ReadError(f"{file}: which GGUF tensors make a {kind} model is not known; known are {known}")
    if header.architecture != ARCHITECTURES[kind]:
        raise ReadError(f"{file} holds a model of architecture {header.architecture[:40]!r}, and this one is {kind}")
    blocks = header.setting("block_count")
    facts = [("blocks", _number(blocks) - _further_blocks(header), config.num_hidden_layers)]
    heads, of_keys = header.setting("attention.head_count"), header.setting("attention.head_count_kv")
    facts.append(("attention heads", heads, config.num_attention_heads))
    if header.architecture != "deepseek2":  # whose newer files speak of one head, of the latent
        facts.append(("key and value heads", heads if of_keys is None else of_keys, config.num_key_value_heads))
    for what, said, own in facts:
        if said != own and not isinstance(said, list):
            raise ReadError(f"{file} is of a model with {said} {what}, and this one has {own}")


def _further_blocks(header: Header) -> int:
    """Blocks behind the model's own, which predict further tokens."""
    return _number(header.setting("nextn_predict_layers"))


def _number(said: Any) -> int:
    return said if type(said) is int else 0


def _may_be_left(name: str, header: Header, config: Any, used: set[str]) -> str | None:
    """Why a tensor of the file changes nothing in this model; None if it might."""
    if ROTARY.fullmatch(name):
        return "rotary factors: the model makes its own from its configuration"
    block = re.match(r"blk\.(\d+)\.", name)
    if block and config.num_hidden_layers <= int(block[1]) < _number(header.setting("block_count")):
        return "of a block that predicts further tokens"
    if re.search(r"\.attn_[kv]_b\.weight$", name) and re.sub(r"_[kv]_b\.", "_kv_b.", name) in used:
        return "a part of attn_kv_b, which is there as a whole"
    return None


def _wanted(header: Header, model: Any, config: Any) -> Iterator[tuple[str, tuple[int, ...], Weight | None]]:
    """Every weight of the language model with its shape, and where the file has it; None if it does not."""
    names = tensor_names(header.architecture, config.num_hidden_layers)
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    decoder, head = paths.get(id(model.get_decoder()), "model"), paths.get(id(model.get_output_embeddings()), "lm_head")
    tied = model.config.tie_word_embeddings or f"{head}.weight" in getattr(model, "all_tied_weights_keys", {})
    experts = {
        path: module
        for path, module in modules.items()
        if path.startswith(f"{decoder}.") and stacked_parameters(module) and hasattr(module, "num_experts")
    }
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in model.state_dict():  # parameters, and buffers that are stored
        tensor, owner = tensors[name], name.rpartition(".")[0]
        shape = tuple(tensor.shape)
        if owner == head:
            stored = header.tensors.get(name.replace(head, "output"))
            if stored is None and not tied:  # as llama.cpp reads such a file
                stored = header.tensors.get("token_embd.weight")
            if stored is not None or not tied:
                yield name, shape, stored and Weight(shape, (Piece(stored),))
        elif owner in experts:
            if name.rpartition(".")[2] == "down_proj":
                yield from _experts(header, owner, experts[owner])
            elif name.endswith("_bias"):
                yield name, shape, _expert_biases(header, name, shape, experts[owner])
        elif name.startswith(f"{decoder}."):
            yield name, shape, _plain(header, names, name, f"model.{name.removeprefix(f'{decoder}.')}", shape, config)


def _plain(header: Header, names: Any, name: str, known_as: str, shape: tuple[int, ...], config: Any) -> Weight | None:
    known_as = known_as.replace("e_score_correction_bias", "e_score_correction.bias")
    key = names.get_name(known_as, (".weight", ".bias")) or ""
    stored = header.tensors.get(key) or header.tensors.get(f"{key}.weight")
    if stored is None:
        if key.endswith("attn_kv_b.weight"):
            parts = [header.tensors.get(key.replace("kv_b", part)) for part in ("k_b", "v_b")]
            if all(parts):
                return Weight(shape, tuple(Piece(part) for part in parts), "latent", config.num_attention_heads)
        return None
    arch = header.architecture
    if arch in INTERLEAVED and (match := re.search(r"\.(q|k)_proj\.(weight|bias)$", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        return Weight(shape, (Piece(stored),), "rows", heads)
    return Weight(shape, (Piece(stored),), "norm" if arch in NORMS_PLUS_ONE and name.endswith("norm.weight") else "")


def _experts(header: Header, owner: str, module: Any) -> Iterator[tuple[str, tuple[int, ...], Weight | None]]:
    """Each matrix of each expert, `[out, in]`: rows of a stack, or a tensor of its own in older files."""
    if reason := refusal(module):
        raise ReadError(f"{header.path.name}: the experts {owner} cannot be filled: {reason}")
    how = form(module)
    down = module.down_proj.mT if how.transposed else module.down_proj
    count, hidden, inner = down.shape
    block = _block(owner)
    both = header.tensors.get(f"{block}.ffn_gate_up_exps.weight")
    for projection in how.projections:
        kind = projection.removesuffix("_proj")
        shape = (hidden, inner) if kind == "down" else (inner, hidden)
        stack = header.tensors.get(f"{block}.ffn_{kind}_exps.weight")
        for index in range(count):
            alone = header.tensors.get(f"{block}.ffn_{kind}.{index}.weight")
            piece = None
            if stack is not None and stack.shape == (count, *shape):
                piece = Piece(stack, index * shape[0], shape[0])
            elif both is not None and kind != "down" and both.shape == (count, 2 * inner, hidden):
                piece = Piece(both, (2 * index + (kind == "up")) * inner, inner)
            elif alone is not None and alone.shape == shape:
                piece = Piece(alone)
            elif found := stack or both or alone:
                raise ReadError(
                    f"{header.path.name}: {found.name} has the shape {list(found.shape)}, and {count} experts of "
                    f"{list(shape)} are asked for: it is another model's file"
                )
            yield f"{owner}.{index}.{projection}.weight", shape, piece and Weight(shape, (piece,))


def _expert_biases(header: Header, name: str, shape: tuple[int, ...], module: Any) -> Weight | None:
    block = _block(name)
    kinds = ("gate", "up") if "gate_up" in name else ("down",)
    found = [header.tensors.get(f"{block}.ffn_{kind}_exps.bias") for kind in kinds]
    if not all(found):
        return None
    pieces = tuple(Piece(stored) for stored in found)
    if len(pieces) == 1:
        return Weight(shape, pieces)
    return Weight(shape, pieces, "taking turns" if form(module).interleaved else "one after the other")


def _block(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    return f"blk.{number[1]}" if number else "blk"


def _fitting(header: Header, name: str, shape: tuple[int, ...], weight: Weight) -> Weight:
    """The weight itself; raises ReadError unless what is stored has the parameter's shape."""
    first = weight.pieces[0].stored
    if weight.change == "latent":
        try:
            latent(weight, [of_blocks(piece.stored.type, _no_bytes(piece.stored)) for piece in weight.pieces])
            return weight
        except (ValueError, RuntimeError):
            fits = False
    elif len(weight.pieces) > 1:
        fits = sum(math.prod(piece.stored.shape) for piece in weight.pieces) == math.prod(shape)
    elif weight.pieces[0].rows is not None:
        return weight
    else:
        fits = [n for n in first.shape if n != 1] == [n for n in shape if n != 1]
    if not fits:
        what = "vocabulary" if first.name in ("token_embd.weight", "output.weight") else "shape"
        raise ReadError(
            f"{header.path.name}: {first.name} is {list(first.shape)} and the model's {name} is {list(shape)}: a model "
            f"of another {what}"
        )
    if any(piece.stored.quantized for piece in weight.pieces) and (len(shape) != 2 or len(weight.pieces) > 1):
        raise ReadError(
            f"{header.path.name}: {first.name} {list(first.shape)} is stored as {first.type}, no matrix is it"
        )
    return weight


def _no_bytes(stored: Stored) -> Tensor:
    return torch.empty(stored.rows, stored.nbytes // stored.rows, dtype=torch.uint8, device="meta")


def latent(weight: Weight, parts: list[Any]) -> GGUFLatent:
    """kv_b of two parts, flat as they are stored; raises ValueError or RuntimeError where they do not fit."""
    key, value = (part.blocks.unflatten(0, (weight.heads, -1)) for part in parts)
    kinds = [part.type for part in parts]
    return GGUFLatent(weight.shape, *kinds, key, value, method=" and ".join(dict.fromkeys(kinds))).checked()
