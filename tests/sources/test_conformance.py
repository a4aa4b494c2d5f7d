"""The built-in sources pass the suite that a third party's must pass, and the suite can fail."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qbench.catalog import options
from qbench.checkpoint import packed
from qbench.passes.quantize import quantize_model
from qbench.registry import SOURCE, find, make, make_quantizer, names
from qbench.sources.file import File
from qbench.sources.folder import Folder
from qbench.sources.hub import Hub, commit
from qbench.sources.local import Local
from qbench.sources.packed import Packed
from qbench.sources.random import Random
from qbench.sources.smollm2 import SmolLM2
from qbench.sources.tiny import Tiny, build
from qbench.testing import SourceConformance
from tests.conftest import ROOT
from tests.sources.hub_server import serving


def save(place: Path, seed: int) -> Path:
    model, tokenizer = build("dense", seed)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def damaged(place: Path) -> Path:
    weights = save(place, 0) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return place


class TestLocal(SourceConformance):
    def make(self, place):
        return Local(path=str(save(place, 0)))

    def other(self, place):
        return Local(path=str(save(place, 1)))

    def broken(self, place):
        return [Local(), Local(path=str(place / "missing")), Local(path=str(damaged(place / "damaged")))]


class TestHub(SourceConformance):
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch, tmp_path):
        """A stand-in for the Hub on the loopback, with a cache of the test's own."""
        from huggingface_hub import constants

        with serving() as hub:
            url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
            commit.cache_clear()
            self.hub = hub
            yield
            commit.cache_clear()

    def make(self, place):
        self.hub.push("org/tiny", save(place, 0))
        return Hub(id="org/tiny")

    def other(self, place):
        self.hub.push("org/other", save(place, 1))
        return Hub(id="org/other")

    def broken(self, place):
        self.hub.push("org/damaged", damaged(place / "damaged"))
        missing = Hub(id="org/missing")
        return [Hub(), missing, replace(missing, revision="0" * 40), Hub(id="org/damaged")]


class TestTiny(SourceConformance):
    def make(self, place):
        return Tiny(architecture="moe", seed=0)

    def other(self, place):
        return Tiny(architecture="moe", seed=1)

    def broken(self, place):
        return [Tiny(), Tiny(architecture="sparse")]


class TestRandom(SourceConformance):
    def make(self, place):
        return Random(shape="smollm2-135m", layers=2, seed=0)

    def other(self, place):
        return Random(shape="smollm2-135m", layers=2, seed=1)

    def broken(self, place):
        return [Random(), Random(shape="qwen3-9b"), Random(shape="smollm2-135m", layers=31)]


class TestPacked(SourceConformance):
    def make(self, place, seed=0):
        model, tokenizer = build("dense", seed)
        model.eval().requires_grad_(False)
        quantize_model(model, make_quantizer({"name": "rtn"}))
        origin = {"run_id": "0", "model": {"name": "tiny"}, "quantizer": {"name": "rtn", "nbits": 4}}
        packed.save(model, tokenizer, place, origin=origin)
        return Packed(path=str(place))

    def other(self, place):
        return self.make(place, seed=1)

    def broken(self, place):
        harmed = self.make(place / "harmed")
        weights = next((place / "harmed").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        return [Packed(), Packed(path=str(place / "missing")), harmed]


@pytest.mark.slow
class TestSmolLM2(SourceConformance):
    def make(self, place):
        return SmolLM2()

    def other(self, place):
        return SmolLM2(seed=1)

    def broken(self, place):  # its package is absent, or another's file is in its place
        pytest.skip("see test_smollm2.py")

    def cache(self, place):
        return Path(os.environ.get("QBENCH_TEST_CACHE", ROOT / "outputs" / "models"))


def test_every_registered_source_is_tested_here():
    ours = {find(SOURCE, name) for name in names(SOURCE)}
    assert {cls for cls in ours if cls.__module__.startswith("qbench.")} == {
        *(File, Hub, Local, Packed, Random, SmolLM2, Tiny)  # File: test_file.py
    }


@pytest.mark.parametrize("option", options("model"))
def test_every_model_lists_the_fields_of_its_source(option):
    """A key that the YAML leaves out cannot be set on the command line."""
    text = (resources.files("qbench.conf") / "model" / f"{option}.yaml").read_text(encoding="utf-8")
    settings = OmegaConf.to_container(OmegaConf.create(text))
    made = make(SOURCE, settings)
    assert set(settings) - {"source"} == {field.name for field in fields(made)}
    assert made.name == settings["name"]


@dataclass(frozen=True)
class Careless(Local):
    """Identifies a model by where it lies, and delivers it as it was trained."""

    def fingerprint(self):
        return f"careless:{self.path}"

    def load(self, dtype, device, cache, offload=False, identity=None):
        loaded = super().load(torch.float32, device, cache)
        return replace(loaded, model=loaded.model.train().requires_grad_(True))

    def tokenizer(self, cache):
        return build("dense", 0)[1]


@pytest.mark.parametrize(
    ("contract", "arguments"),
    [
        ("test_the_fingerprint_is_stable_and_names_no_place", ("source", "tmp_path")),
        ("test_it_loads_in_eval_mode_in_each_precision", ("source", "tmp_path")),
        ("test_a_known_fingerprint_is_not_computed_again", ("source", "tmp_path")),
    ],
)
def test_the_suite_finds_what_a_careless_source_does(contract, arguments, tmp_path):
    source = Careless(path=str(save(tmp_path / "made", 0)))
    given = {"source": source, "tmp_path": tmp_path}
    with pytest.raises(AssertionError):
        getattr(SourceConformance(), contract)(*(given[name] for name in arguments))


class Harmed(Folder):
    """The stream of a folder whose block i goes through `harm(block, i)`."""

    def __init__(self, *arguments, harm, **settings):
        super().__init__(*arguments, **settings)
        self.harm = harm

    def block(self, i):
        return self.harm(super().block(i), i)


def one_bit(block, i):
    block.mlp.up_proj.weight[-1, -1] += 2**-10 if i == 1 else 0
    return block


def trainable(block, i):
    return block.requires_grad_(True)


def dropped(block, i):
    block.mlp.up_proj = torch.nn.Identity().eval()
    return block


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (one_bit, r"model\.layers\.1\.mlp\.up_proj\.weight must have the bits that load gives"),
        (trainable, "block 0: no parameter may need a gradient"),
        (lambda block, i: block.train(), "block 0 must be in eval mode"),
        (lambda block, i: block.half(), r"must be in torch\.float32, as load gives it"),
        (dropped, r"model\.layers\.0\.mlp\.up_proj\.weight is on one side alone"),
    ],
)
def test_the_suite_finds_a_stream_that_is_another_model(harm, sentence, tmp_path):
    @dataclass(frozen=True)
    class Streamed(Local):
        def stream(self, dtype, device, cache, identity=None):
            return Harmed(self.path, dtype, device, harm=harm)

    source = Streamed(path=str(save(tmp_path / "made", 0)))
    with pytest.raises(AssertionError, match=sentence):
        SourceConformance().test_a_stream_has_the_loaded_models_bits(source, tmp_path)


def test_the_suite_finds_a_stream_that_computes_something_else(tmp_path):
    def rectified(block, i):
        block.mlp.act_fn = torch.nn.ReLU()
        return block

    @dataclass(frozen=True)
    class Streamed(Local):
        def stream(self, dtype, device, cache, identity=None):
            return Harmed(self.path, dtype, device, harm=rectified)

    source = Streamed(path=str(save(tmp_path / "made", 0)))
    loaded = source.load(torch.float32, torch.device("cpu"), tmp_path)
    with pytest.raises(AssertionError, match="block by block the logits must be the same"):
        SourceConformance().test_a_stream_computes_what_the_loaded_model_does(source, loaded, tmp_path)


def test_the_suite_finds_a_skeleton_of_another_shape(tmp_path):
    @dataclass(frozen=True)
    class Wrong(Tiny):
        def skeleton(self):
            return build("dense", self.seed)[0]

    source = Wrong(architecture="moe")
    with pytest.raises(AssertionError, match="the skeleton must have the loaded model's parameters"):
        SourceConformance().test_the_skeleton_has_the_models_shapes(
            source, source.load(torch.float32, torch.device("cpu"), tmp_path)
        )
