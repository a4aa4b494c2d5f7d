"""What llama.cpp itself computes from GGUF files of ours: small models of every architecture that is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.llama_cpp import divergence, served
from qbench.checkpoint import gguf
from qbench.passes.quantize import quantize_model
from qbench.sources.tiny import byte_tokenizer
from tests.checkpoint.test_gguf import WRITTEN, AsTheyAre, made

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
    # a tokenizer of bytes has no merges, without which llama.cpp reads none; ids are all that is asked here
    monkeypatch.setattr(gguf.gguf_settings, "add_tokenizer", lambda writer, *_: writer.add_tokenizer_model("no_vocab"))


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), MODELS, ids=[f"{n}-{len(s)}" for n, s in MODELS])
def test_llama_cpp_computes_the_same(llama_cpp, tmp_path, name, settings):
    """Weights as F32, of whose inputs llama.cpp rounds nothing; its GELU, Gemma's, is a table in fp16."""
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
