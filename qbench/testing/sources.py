"""The conformance suite that any source of models, ours or a third party's, must pass.

    from qbench.testing import SourceConformance

    class TestMine(SourceConformance):             # pytest finds it by its name
        def make(self, place):
            ...                                    # writes a small model to the folder `place`
            return Mine(path=str(place))

        def other(self, place):                    # the same with another weight
            ...

        def broken(self, place):                   # what cannot be had
            return [Mine(path=str(place / "missing"))]

Every method below tests one contract of qbench.sources.source.Source and says in its failure which one is broken; those
of `stream`, which a source need not have, are StreamedSource's. The model is loaded several times, so a small one saves
minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qbench.errors import PointError, RequestError
from qbench.model.blocks import NotAChainError
from qbench.passes.chain import Chain
from qbench.quant.original import BITS_PER_WEIGHT
from qbench.sources.source import LoadedModel, Source
from qbench.sources.stream import Stream, assembled

TEXT = "A plain text of one line."
PLAIN = (bool, int, float, str, type(None), list, tuple)  # what a YAML file can say
CPU = torch.device("cpu")


class SourceConformance:
    """Subclass it under a name that starts with `Test` and define `make`, `other` and `broken`."""

    def make(self, place: Path) -> Source:
        """A source that can be had without a network; `place` is a path for its files, where nothing is yet."""
        raise NotImplementedError

    def other(self, place: Path) -> Source:
        """A source with a model of other weights, as `make`."""
        raise NotImplementedError

    def broken(self, place: Path) -> Sequence[Source]:
        """Sources whose model cannot be had: nothing named, nothing there, damaged."""
        raise NotImplementedError

    def cache(self, place: Path) -> Path:
        """Where the source keeps what it converts; a folder of this test's own unless another is named."""
        return place / "cache"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return self.make(tmp_path / "made")

    @pytest.fixture
    def loaded(self, source: Source, tmp_path: Path) -> LoadedModel:
        return source.load(torch.float32, CPU, self.cache(tmp_path))

    def test_it_is_a_frozen_dataclass_of_plain_settings(self, source: Source) -> None:
        assert is_dataclass(source), "a source must be a dataclass: its fields are the settings of `model`"
        assert source.__dataclass_params__.frozen, "a source must be frozen: a point's model does not change"
        for field in fields(source):
            assert isinstance(value := getattr(source, field.name), PLAIN), (
                f"{field.name}={value!r} is nothing that YAML can say"
            )
        assert source.name, "a source must have a name, under which results show the model"

    def test_the_fingerprint_is_stable_and_names_no_place(self, source: Source, tmp_path: Path) -> None:
        found = source.fingerprint()
        assert found == source.fingerprint() == replace(source).fingerprint(), "the fingerprint must be stable"
        assert found.strip(), "the fingerprint must not be empty"
        assert "\n" not in found, "the fingerprint must be one line"
        assert str(tmp_path) not in found, "the fingerprint must be the same on every machine: it holds a path of this"

    def test_the_fingerprint_follows_the_content_and_not_the_name(self, source: Source, tmp_path: Path) -> None:
        assert replace(source, name="another").fingerprint() == source.fingerprint(), (
            "the name must not enter the fingerprint: it changes no number"
        )
        assert self.other(tmp_path / "other").fingerprint() != source.fingerprint(), (
            "other weights must have another fingerprint: results of one would be shown as the other's"
        )

    def test_naming_and_pinning_keep_the_model(self, source: Source) -> None:
        pinned = source.pinned()
        assert pinned.pinned() == pinned, "what is pinned must stay as it is"
        for given in ((), [field.name for field in fields(source)]):
            named = source.named(given)
            assert isinstance(named.name, str), "a name must be a text"
            assert named.name, "a name must not be empty"
            assert replace(named, name=source.name) == source, "named must change the name and nothing else"
        assert pinned.fingerprint() == source.fingerprint(), "a source must pin what it fingerprints"

    def test_it_loads_in_eval_mode_in_each_precision(self, source: Source, tmp_path: Path) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            loaded = source.load(dtype, CPU, self.cache(tmp_path))
            assert not loaded.model.training, "load must give the model in eval mode"
            assert not any(p.requires_grad for p in loaded.model.parameters()), "no parameter may require a gradient"
            assert {p.dtype for p in loaded.model.parameters() if p.is_floating_point()} == {dtype}, (
                f"all parameters must be in {dtype}, as asked"
            )
            assert {p.device.type for p in loaded.model.parameters()} == {"cpu"}, "the model must be on the device"
            assert loaded.fingerprint == source.fingerprint(), "what is loaded must have the source's fingerprint"

    def test_a_known_fingerprint_is_not_computed_again(self, source: Source, tmp_path: Path) -> None:
        found = source.load(torch.float32, CPU, self.cache(tmp_path), identity="known").fingerprint
        assert found == "known", "load must take over the fingerprint that it is told: hashing takes minutes"

    def test_loading_twice_gives_the_same_model_to_the_bit(
        self, source: Source, loaded: LoadedModel, tmp_path: Path
    ) -> None:
        again = source.load(torch.float32, CPU, self.cache(tmp_path))
        assert torch.equal(_logits(loaded), _logits(again)), "the same source must give the same logits to the bit"

    def test_the_tokenizer_alone_is_the_models(self, source: Source, loaded: LoadedModel, tmp_path: Path) -> None:
        ids = source.tokenizer(self.cache(tmp_path))(TEXT)["input_ids"]
        assert ids == loaded.tokenizer(TEXT)["input_ids"], "tokenizer and load must give the same tokenizer"
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        assert ids, "the tokenizer must find tokens in a text"
        assert max(ids) < rows, f"the tokenizer gives the id {max(ids)}, the embedding has {rows} rows"

    def test_the_skeleton_has_the_models_shapes(self, source: Source, loaded: LoadedModel) -> None:
        skeleton = source.skeleton()
        if skeleton is None:
            pytest.skip("this source has no skeleton: --dry-run shows no size")
        assert _shapes(skeleton) == _shapes(loaded.model), "the skeleton must have the loaded model's parameters"

    def test_the_configuration_is_the_models(self, source: Source, loaded: LoadedModel) -> None:
        about = source.configuration()
        if about is None:
            pytest.skip("this source knows its configuration only once it is loaded")
        found, expected = about.get_text_config(decoder=True), loaded.model.config.get_text_config(decoder=True)
        for key in ("vocab_size", "max_position_embeddings"):
            assert getattr(found, key, None) == getattr(expected, key, None), f"{key} must be that of the loaded model"

    @torch.no_grad()
    def test_a_stream_has_the_loaded_models_bits(self, source: Source, tmp_path: Path) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            stream = self.stream(source, dtype, tmp_path)
            expected = source.load(dtype, CPU, self.cache(tmp_path)).model
            model, prefix = stream.rest(), f"{stream.prefix}."
            assert len(stream) == len(expected.get_submodule(stream.prefix)), "len must be the number of blocks"
            blocks = [stream.block(i) for i in (*range(len(stream)), 0)]  # the first one again
            for name, module in [("rest", model), *((f"block {i}", block) for i, block in enumerate(blocks))]:
                assert not any(part.training for part in module.modules()), f"{name} must be in eval mode"
                assert not any(p.requires_grad for p in module.parameters()), (
                    f"{name}: no parameter may need a gradient"
                )
            if not stream.resident:
                inside = _tensors(model.get_submodule(stream.prefix)).values()
                assert all(tensor.is_meta for tensor in inside), "rest must leave the blocks on the meta device"
                assert blocks[0] is not blocks[-1], "every block must be new: whoever has one may let its weights go"
            found = {n: t for n, t in _tensors(model).items() if not n.startswith(prefix)}
            for i, block in enumerate(blocks):
                found |= {f"{prefix}{i % len(stream)}.{n}": t for n, t in _tensors(block).items()}
            wanted = _tensors(expected)
            assert found.keys() == wanted.keys(), f"{sorted(found.keys() ^ wanted.keys())[0]} is on one side alone"
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype, f"{name} must be in {tensor.dtype}, as load gives it"
                assert torch.equal(found[name], tensor), f"{name} must have the bits that load gives"
            kept = [stream.bytes_of_block(i) for i in (None, *range(len(stream)))]
            assert all(n > 0 for n in kept), "bytes_of_block must tell what a block takes, and the rest"
            assert _settings(model) == _settings(expected), "rest must have the configuration of the loaded model"

    def test_a_stream_computes_what_the_loaded_model_does(
        self, source: Source, loaded: LoadedModel, tmp_path: Path
    ) -> None:
        stream = self.stream(source, torch.float32, tmp_path)
        try:
            chain = Chain.of(stream.rest())
        except NotAChainError as error:
            pytest.skip(f"{error}: it is loaded whole")
        ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
        states, calls = chain.begin(ids)
        for i in range(len(stream)):
            states = chain.block(i, states, calls, stream.block(i))
        assert torch.equal(chain.finish(states, ids), _logits(loaded)), "block by block the logits must be the same"

    def test_what_cannot_be_streamed_is_one_sentence(self, source: Source, tmp_path: Path) -> None:
        self.stream(source, torch.float32, tmp_path)
        for broken in self.broken(tmp_path / "broken"):
            with pytest.raises((RequestError, PointError)) as caught:
                _whole_way_streamed(broken, self.cache(tmp_path))
            assert "\n" not in str(caught.value), f"{broken}: the error must be one sentence on one line"
            assert len(str(caught.value)) > 20, f"{broken}: the error must say what is wrong and what would be right"

    def stream(self, source: Source, dtype: torch.dtype, place: Path) -> Stream:
        """The source's stream; skips the test where it has none."""
        stream = source.stream(dtype, CPU, self.cache(place)) if hasattr(source, "stream") else None
        if stream is None:
            pytest.skip("this source does not stream: the whole model is loaded")
        return stream

    def test_it_says_whether_it_is_quantized_already(self, source: Source, loaded: LoadedModel) -> None:
        if not source.original:
            assert source.made_by()["name"], "a model that is quantized already must say by what: made_by()['name']"
            return
        assert source.made_by() is None, "an original is made by no quantizer"
        narrow = [n for n, p in loaded.model.named_parameters() if 8 * p.element_size() < BITS_PER_WEIGHT]
        assert not narrow, f"{narrow[:1]} has fewer than 16 bits, so this is no original"

    def test_nothing_is_unpickled(self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("loading a model must not unpickle: a pickle runs the code that it holds")

        for target in ("torch.load", "pickle.load", "pickle.loads"):
            monkeypatch.setattr(target, refused)
        source.load(torch.float32, CPU, self.cache(tmp_path))

    def test_what_cannot_be_had_is_one_sentence(self, tmp_path: Path) -> None:
        broken = list(self.broken(tmp_path / "broken"))
        assert broken, "broken must name a source whose model cannot be had"
        for source in broken:
            with pytest.raises(RequestError) as caught:
                _whole_way(source, self.cache(tmp_path))
            assert "\n" not in str(caught.value), f"{source}: the error must be one sentence on one line"
            assert len(str(caught.value)) > 20, f"{source}: the error must say what is wrong and what would be right"


def _whole_way(source: Source, cache: Path) -> None:
    """As a point goes it: a source may find out at any step that its model cannot be had."""
    source.pinned().fingerprint()
    source.load(torch.float32, CPU, cache)


def _whole_way_streamed(source: Source, cache: Path) -> None:
    source.pinned().fingerprint()
    stream = source.stream(torch.float32, CPU, cache)
    assert stream is not None, f"{source}: stream must refuse what cannot be had, as load does"
    assembled(stream)


def _logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        return loaded.model(ids).logits


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if tensor is not None}


def _settings(model: Any) -> tuple[Any, ...]:
    generation = model.generation_config.to_dict() if model.can_generate() else None
    return model.config.to_dict(), model.name_or_path, generation


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return dict(_named_shapes(model))


def _named_shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape)
