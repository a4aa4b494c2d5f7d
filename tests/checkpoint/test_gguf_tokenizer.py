"""Tokenizers in GGUF files: those that llama.cpp has a name for, or scores; of others a warning."""

from __future__ import annotations

import json
import logging
from importlib.resources import files

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qbench.checkpoint import gguf, gguf_tokenizer
from tests.passes.architectures import build


def described(pre) -> dict:
    made = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    return json.loads(made.to_str())


def test_how_words_are_split_has_a_name_or_none():
    split, bytes_ = pre_tokenizers.Split, pre_tokenizers.ByteLevel
    llama3, qwen2 = gguf_tokenizer.SPLITS
    whole = bytes_(add_prefix_space=False, use_regex=False)

    def sequence(*steps):
        return described(pre_tokenizers.Sequence(list(steps)))

    words = gguf_tokenizer.words_of
    assert words(described(bytes_(add_prefix_space=False))) == "gpt-2"
    assert words(sequence(pre_tokenizers.Digits(True), bytes_(add_prefix_space=False))) == "smollm"
    assert words(sequence(split(Regex(llama3), "isolated"), whole)) == "llama-bpe"
    assert words(sequence(split(Regex(qwen2), "isolated"), whole)) == "qwen2"
    assert words(sequence(split(Regex(r"\d"), "isolated"), whole)) is None
    assert words(described(pre_tokenizers.Whitespace())) is None
    assert words(described(bytes_(add_prefix_space=True))) is None
    assert words({}) is None


def pieces(kind: str, complete: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of sentence pieces, with bytes for what it lacks; `complete`: every pair that makes one is merged."""
    space = gguf_tokenizer.SPACE
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space)
    text = (files("qbench.texts") / "mini.txt").read_text(encoding="utf-8")[:40000]
    trained.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    vocabulary = trained.get_vocab()
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocabulary, key=vocabulary.get)
        for cut in (range(1, len(piece)) if piece not in special else ())
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = merges if complete else merges[::2]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", space)
    if kind == "llama":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(space), replaced])
    elif kind == "gemma":
        made.normalizer, made.pre_tokenizer = replaced, pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("kind", "prefix"), [("llama", True), ("gemma", False), ("metaspace", True)])
def test_sentence_pieces_have_scores(kind, prefix, tmp_path):
    tokenizer = pieces(kind)
    gguf.write(build("Llama", vocab_size=len(tokenizer) + 2), tokenizer, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    names = ("model", "tokens", "token_type", "scores", "add_space_prefix", "bos_token_id", "add_bos_token")
    found = [reader.fields[f"tokenizer.ggml.{name}"].contents() for name in names]
    model, tokens, kinds, scores, prefixed, bos, added = found
    assert (model, prefixed, bos, added) == ("llama", prefix, 1, False)
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[-3:] == [1, 5, 5]
    assert scores[-3] == min(score for score in scores if score > gguf_tokenizer.UNMERGED)
    assert scores[:4] == [gguf_tokenizer.UNMERGED] * 4


def test_merges_that_no_scores_stand_for_are_not_written(tmp_path, caplog):
    tokenizer = pieces("llama", complete=False)
    gguf.write(build("Llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    assert "the GGUF file has no tokenizer" in caplog.text


def test_a_tokenizer_without_a_name_costs_a_warning_and_no_file(tmp_path, caplog):
    made = Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with caplog.at_level(logging.WARNING):
        gguf.write(build("Llama"), PreTrainedTokenizerFast(tokenizer_object=made), tmp_path / "model.gguf")
    assert "the GGUF file has no tokenizer" in caplog.text
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.model"].contents() == "no_vocab"
