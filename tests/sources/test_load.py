import json

import pytest
import torch

from qbench.errors import RequestError
from qbench.model.linears import coverage, find_linears
from qbench.sources import pretrained, tiny
from qbench.sources.hub import Hub
from qbench.sources.local import Local
from qbench.sources.tiny import Tiny

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path, tiny):
    """The tiny model as a folder that save_pretrained wrote."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def local(path):
    return Local(path=str(path))


def logits(model):
    return model(torch.arange(64)[None]).logits


def test_local_folder_gives_the_same_model(saved, tiny, tmp_path):
    loaded = local(saved).load(torch.float32, CPU, tmp_path)
    assert torch.equal(logits(loaded.model), logits(tiny[0]))
    assert loaded.tokenizer("plain text")["input_ids"] == tiny[1]("plain text")["input_ids"]


def test_fingerprint_follows_the_content(saved):
    before = local(saved).fingerprint()
    assert local(saved).fingerprint() == before
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert local(saved).fingerprint() != before


DEFINING = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MORE = ("x.tiktoken", "spiece.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja")
BESIDE = ("trainer_state.json", "training_args.bin", "optimizer.safetensors", "README.txt", "README.md", "x.py")


def test_fingerprint_covers_what_defines_the_model_and_nothing_else(saved):
    def touched(name):
        path = saved / name
        path.parent.mkdir(exist_ok=True)
        before = local(saved).fingerprint()
        path.write_bytes((path.read_bytes() if path.is_file() else b"") + b" ")
        return local(saved).fingerprint() != before

    assert [name for name in (*DEFINING, *MORE) if not touched(name)] == []
    assert [name for name in BESIDE if touched(name)] == []
    config = saved / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoConfig": "x.Y"}}))
    assert touched("x.py")  # now it is code that may run
    assert touched("below/y.py")


def test_fingerprint_is_computed_once_per_point(qbench, saved, monkeypatch):
    from qbench.checkpoint import manifest

    read, hashed = manifest.file_sha256, []
    monkeypatch.setattr(manifest, "file_sha256", lambda path: hashed.append(path.name) or read(path))
    assert qbench("model=local", f"model.path={saved}", "quantizer=rtn", "task.max_windows=1").status == 0
    assert hashed.count("model.safetensors") == 1


OWN_CODE = """
from pathlib import Path
Path("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("dry_run", [False, True])
def test_code_of_a_model_runs_only_when_it_is_trusted(qbench, saved, monkeypatch, tmp_path, dry_run):
    def asked(*args):
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    config = json.loads((saved / "config.json").read_text()) | {"model_type": "own", "auto_map": auto}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "code.py").write_text(OWN_CODE)
    arguments = ("model=local", f"model.path={saved}", *(("--dry-run",) if dry_run else ("task.max_windows=1",)))
    outcome = qbench(*arguments)
    assert outcome.status == 2
    assert outcome.stderr.count("qbench: ") == 1
    assert "model.trust_remote_code=true" in outcome.stderr
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_sentencepiece_alone(saved, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a small text about letters and words" for i in range(300)))
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(saved / "tokenizer"), vocab_size=60, minloglevel=2
    )
    (saved / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (saved / "config.json").write_text(
        json.dumps({**json.loads((saved / "config.json").read_text()), "vocab_size": 60})
    )
    ids = local(saved).tokenizer(tmp_path)("small words")["input_ids"]
    assert len(ids) > 2
    real = pretrained._absent
    monkeypatch.setattr(pretrained, "_absent", lambda module: module == "sentencepiece" or real(module))
    error = ImportError("`tiktoken` is required to read a `tiktoken` file")
    with pytest.raises(RequestError, match=r"only read by the package sentencepiece; install it with: pip install"):
        pretrained.readable(lambda: (_ for _ in ()).throw(error), saved, "m")


def test_corrupt_and_missing_files_give_one_sentence(saved, tmp_path):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RequestError, match="cannot read a model"):
        local(saved).load(torch.float32, CPU, tmp_path)
    weights.unlink()
    with pytest.raises(RequestError, match=r"no \*\.safetensors"):
        local(saved).fingerprint()
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(RequestError, match=r"no \*\.safetensors"):
        local(saved).fingerprint()
    (saved / "config.json").unlink()
    with pytest.raises(RequestError, match=r"no config\.json"):
        local(saved).fingerprint()


def test_unknown_architecture_of_a_config(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(RequestError, match="cannot read a model"):
        local(saved).load(torch.float32, CPU, tmp_path)


def test_unreachable_hub_names_what_works_without_network(tmp_path):
    config = Hub(name="x", id="nobody/nothing", revision="0" * 40)
    with pytest.raises(RequestError, match="model=smollm2-135m"):
        config.load(torch.float32, CPU, tmp_path)


def test_byte_tokenizer_round_trips_any_text():
    tokenizer = tiny.byte_tokenizer()
    text = "A line.\n\n= Title = \ttab, naïve café 中 \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_random_models_depend_on_the_seed_alone():
    torch.manual_seed(5)
    one = tiny.build("dense", 3)[0]
    torch.manual_seed(6)
    state = torch.get_rng_state()
    two = tiny.build("dense", 3)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(tiny.build("dense", 4)[0]))


def test_linears_leave_the_head_and_name_the_experts():
    dense = find_linears(tiny.build("dense", 0)[0])
    assert len(dense.layers) == 14
    assert not dense.skipped
    assert not dense.experts
    moe = tiny.build("moe", 0)[0]
    found = find_linears(moe)
    assert all("self_attn" in name for name in found.layers)
    assert list(found.experts) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert [(s.name, s.weights, s.reason) for s in found.skipped] == [
        (f"model.layers.{i}.mlp.gate.weight", 4 * 64, "router, kept in 16 bit") for i in range(2)
    ]
    assert coverage(moe) == 0


@pytest.mark.parametrize("source", ["tiny", "local"])
def test_sixteen_bit_models_keep_their_rotary_frequencies(source, saved, tmp_path):
    config = local(saved) if source == "local" else Tiny(name="t", architecture="dense")
    loaded = config.load(torch.bfloat16, CPU, tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    wide = config.load(torch.float32, CPU, tmp_path)
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, wide.model.model.rotary_emb.inv_freq)
