"""What llama.cpp itself computes from GGUF files of ours: small models of every architecture that is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.llama_cpp import divergence, opened, served
from qbench.checkpoint import gguf, gguf_tokenizer
from qbench.passes.quantize import quantize_model
from qbench.sources.tiny import byte_tokenizer
from tests.checkpoint.test_gguf import WRITTEN, AsTheyAre, made
from tests.checkpoint.test_gguf_tokenizer import pieces
from tests.passes.architectures import build

pytestmark = pytest.mark.oracle
# Of 27 blocks, which llama.cpp takes for the Lite, whose queries have no low rank.
LITE = WRITTEN["DeepseekV2"] | {"q_lora_rank": None, "num_hidden_layers": 27}
MODELS = [*WRITTEN.items(), ("DeepseekV2", LITE)]


@pytest.fixture
def llama_cpp(monkeypatch):
    place = Path(sys.prefix) / "oracle-llama"
    if not place.is_dir():
        pytest.skip("llama.cpp is not installed; make oracle does it")
    monkeypatch.syspath_prepend(str(place))


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), MODELS, ids=[f"{n}-{len(s)}" for n, s in MODELS])
def test_llama_cpp_computes_the_same(llama_cpp, tmp_path, monkeypatch, name, settings):
    """Weights as F32, of whose inputs llama.cpp rounds nothing; its GELU, Gemma's, is a table in fp16."""
    # a tokenizer of bytes has no merges, without which llama.cpp reads none; ids are all that is asked here
    monkeypatch.setattr(gguf_tokenizer, "add", lambda writer, *_: writer.add_tokenizer_model("no_vocab"))
    model = made(name, **settings)
    windows = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = [model(window[None]).logits[0] for window in windows]
    quantize_model(model, AsTheyAre())
    gguf.write(model, byte_tokenizer(), path := tmp_path / "model.gguf")
    found = list(served(path, windows))
    spread = float(torch.cat(expected).std())
    tolerance = 1e-2 if name.startswith("Gemma") else 1e-4
    for before, after in zip(expected, found, strict=True):
        assert spread > 0.1
        assert float((before - after).abs().max()) < tolerance * spread
        assert float(divergence(before, after).mean()) < tolerance**2


TEXTS = [
    "The moon is the only natural satellite of the Earth.",
    "  two  spaces, a tab\t and\nlines\n\n",
    "naïve café, Привет, 東京, \U0001f600 and \u00a0",
    "x",
    "",
]


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
def test_llama_cpp_splits_texts_into_the_same_pieces(llama_cpp, tmp_path, kind):
    tokenizer = pieces(kind)
    gguf.write(build("Llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    llama = opened(tmp_path / "model.gguf", 32)
    for text in TEXTS:
        if kind == "metaspace":  # which puts no space before one; llama.cpp does always
            text = text.lstrip()
        assert llama.tokenize(text, add_special=False) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    llama.close()
