"""What a GGUF file says of its tokenizer: of byte pairs, or of sentence pieces; both as `tokenizers` describes them.

llama.cpp merges sentence pieces by a score of what two of them make, where `tokenizers` has a list of merges. The two
are the same where that list was made of scores, as transformers converts such tokenizers: it has every pair of pieces
that makes another, in the order of what they make. That is checked here, and a list of another kind is not written.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % "{1,3}": "llama-bpe", WORDS % "": "qwen2"}  # a regular expression of words -> llama.cpp's name for it
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
UNKNOWN, BYTE = 2, 6
UNMERGED = -10000.0  # the score of a piece that no merge makes
SPACE = "\u2581"  # what stands for a space in sentence pieces


def add(writer: Any, tokenizer: Any, size: int) -> None:
    """Adds a tokenizer of `size` tokens to a GGUFWriter.

    Of one that llama.cpp has no name for only a warning: the file is then read by us and serves no text.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    words, prefix = words_of(described), prefix_of(described)
    scores = None if prefix is None else scores_of(described)
    if words is None and scores is None:
        log.warning("the GGUF file has no tokenizer: llama.cpp has no name for how this one splits a text into words")
        writer.add_tokenizer_model("no_vocab")
        return
    added = {int(entry["id"]): entry for entry in described.get("added_tokens", [])}
    by_id = {int(index): token for token, index in described["model"]["vocab"].items()}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    tokens, kinds = [], []
    for index in range(size):
        token = by_id.get(index, f"[PAD{index}]")
        kind = NORMAL if index in by_id else UNUSED
        if index in added:
            kind = CONTROL if added[index].get("special") else USER_DEFINED
        if scores is not None:
            kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else kind
            kind = UNKNOWN if token == described["model"].get("unk_token") else kind
            token = token.replace(SPACE, " ") if kind == USER_DEFINED else token
        tokens.append(token)
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    writer.add_tokenizer_pre(words or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores is None:
        writer.add_token_merges([" ".join(pair) for pair in pairs_of(described)])
    else:
        writer.add_token_scores([scores.get(by_id.get(index, ""), UNMERGED) for index in range(size)])
        writer.add_add_space_prefix(prefix)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(int(number))
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def pairs_of(described: Mapping[str, Any]) -> list[Sequence[str]]:
    """The merges, in their order; `tokenizers` wrote each as one text before."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in described["model"]["merges"]]


def prefix_of(described: Mapping[str, Any]) -> bool | None:
    """Whether a tokenizer of sentence pieces puts a space before a text; None for one of another kind.

    Metaspace puts none before a space, where llama.cpp has two then.
    """
    model = described.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        return None
    normalizer, before = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [{"type": "Prepend", "prepend": SPACE}, replaced] and not before:  # Llama 2 and Phi-3
        return True
    if steps == [replaced] and (not before or before.get("pattern") == {"String": " "}):  # Gemma: no space is left
        return False
    if not steps and before.get("type") == "Metaspace" and before.get("split") is False:
        return before.get("prepend_scheme") != "never" if before.get("replacement") == SPACE else None
    return None


def scores_of(described: Mapping[str, Any]) -> dict[str, float] | None:
    """A score of each piece that merges make, higher the earlier; None unless merging by them is the same."""
    vocabulary = described["model"]["vocab"]
    added = {entry["content"] for entry in described.get("added_tokens", [])}
    merges = [tuple(pair) for pair in pairs_of(described)]
    made = [first + second for first, second in merges]
    first_at: dict[str, int] = {}
    for rank, piece in enumerate(made):
        first_at.setdefault(piece, rank)
    order = [first_at[piece] for piece in made]
    known = set(merges)
    complete = all(
        (piece[:cut], piece[cut:]) in known
        for piece in vocabulary
        if piece not in added
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    if not complete or order != sorted(order):
        return None
    return {piece: -float(rank) for piece, rank in first_at.items()}


def words_of(described: Any) -> str | None:
    """llama.cpp's name for how a tokenizer of byte pairs, as `tokenizers` describes it, cuts words; None for others."""
    if described.get("model", {}).get("type") != "BPE" or described["model"].get("byte_fallback"):
        return None
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex"))
    return None
