"""The conformance suite that any protocol, ours or a third party's, must pass.

    from qbench.testing import ProtocolConformance

    class TestMine(ProtocolConformance):           # pytest finds it by its name
        protocol = Mine

        def settings(self):
            return {"name": "t", "window": 64}

        def text(self, folder, seed):              # writes a text, another one for another seed
            (folder / "text.txt").write_text(...)
            return {"path": str(folder / "text.txt")}

        changing = ({"window": 32},)               # each gives another number, and so must have another name
        nonsense = ({"window": 0},)                # settings that no text could satisfy

Every method below tests one contract and says in its failure which one is broken. The model is a random one of two
decoder layers and 258 bytes of vocabulary, in fp32 on the CPU, and its variant the same with noise on its weights, the
output head's aside, which no method quantizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate.asks import Asks
from qbench.evaluate.protocol import Evaluation, Protocol, Scores
from qbench.record.quality import EvaluationRecord, MetricRecord, TaskRecord, read_mean
from qbench.record.store import Store
from qbench.sources import tiny

Records = tuple[list[EvaluationRecord], list[TaskRecord], dict[str, Scores]]


class ProtocolConformance:
    protocol: ClassVar[type[Any]]
    changing: ClassVar[Sequence[Mapping[str, Any]]] = ()
    nonsense: ClassVar[Sequence[Mapping[str, Any]]] = ()
    runtime: ClassVar[RuntimeConfig] = RuntimeConfig(device="cpu")

    def settings(self) -> dict[str, Any]:
        """The fields of a small evaluation, but for those that say where its text lies."""
        raise NotImplementedError

    def text(self, folder: Path, seed: int) -> dict[str, Any]:
        """Writes a text into the empty folder, a different one for each seed, and returns the fields that name it."""
        raise NotImplementedError

    def make(self, folder: Path, seed: int = 0, **changes: Any) -> Protocol:
        folder.mkdir(parents=True, exist_ok=True)
        return self.protocol(**self.settings() | self.text(folder, seed) | changes)

    def evaluation(self, folder: Path, **changes: Any) -> Evaluation:
        """The walk that a point takes, up to the first model."""
        protocol = self.make(folder, **changes)
        protocol.check(self.runtime)
        source = protocol.read()
        protocol.check_length(source)
        return protocol.prepare(source, tiny.byte_tokenizer(), self.runtime)

    def test_it_is_a_frozen_dataclass_of_its_settings(self, tmp_path: Path) -> None:
        assert is_dataclass(self.protocol), "a protocol must be a dataclass, whose fields are its settings"
        assert self.protocol.__dataclass_params__.frozen, "it must be frozen: nothing may change it under way"
        protocol = self.make(tmp_path)
        assert protocol == self.make(tmp_path), "equal settings must make equal protocols"
        unknown = set(protocol.settings()) - {field.name for field in fields(self.protocol)}
        assert not unknown, f"settings() names what is no field, so that nobody could ask for it: {sorted(unknown)}"
        json.dumps(protocol.settings())
        assert protocol.window > 0, "window must say the longest sequence that the model is handed"

    def test_a_text_is_known_by_its_content(self, tmp_path: Path) -> None:
        here, moved, other = (self.make(tmp_path / str(n), seed) for n, seed in enumerate((0, 0, 1)))
        assert here.read().sha256 == moved.read().sha256, "a text that is moved must keep its sha256"
        assert here.settings() == moved.settings(), "settings() must not hold where the text lies"
        assert here.read().sha256 != other.read().sha256, "another text must have another sha256"

    def test_what_changes_the_number_is_in_the_name(self, tmp_path: Path) -> None:
        plain = self.make(tmp_path)
        name = self.evaluation(tmp_path).identity["protocol"]
        assert self.changing, "say in `changing` which settings change the number"
        for changes in self.changing:
            assert self.make(tmp_path, **changes).settings() != plain.settings(), f"settings() must hold {changes}"
            other = self.evaluation(tmp_path, **changes).identity["protocol"]
            assert other != name, f"{changes} changes the number, so the protocol's name must say it: {name}"

    def test_nonsense_is_refused_in_one_sentence(self, tmp_path: Path) -> None:
        self.make(tmp_path).check(self.runtime)
        assert self.nonsense, "say in `nonsense` what no text could satisfy"
        for changes in self.nonsense:
            protocol = self.make(tmp_path, **changes)
            with pytest.raises(RequestError) as refused:  # it must refuse what no text could satisfy
                protocol.check(self.runtime)
            sentence = str(refused.value)
            assert sentence, f"check must say what is wrong with {changes}"
            assert "\n" not in sentence, f"check must say in one line what is wrong with {changes}"

    def test_ids_are_of_the_vocabulary(self, tmp_path: Path) -> None:
        ids, model = self.evaluation(tmp_path).ids, _model()
        if ids is None:
            return
        assert ids.ndim == 2, "ids must be [windows, tokens]"
        assert ids.size, "there must be ids to score"
        assert np.issubdtype(ids.dtype, np.integer), "ids must be integers"
        rows = model.get_input_embeddings().weight.shape[0]
        assert ids.min() >= 0, "ids must be rows of the model's embedding"
        assert ids.max() < rows, "ids must be rows of the model's embedding"
        assert ids.shape[1] <= self.make(tmp_path).window, "no sequence may be longer than window"

    def test_a_model_beside_itself_differs_by_nothing(self, tmp_path: Path) -> None:
        model = _model()
        records = _run(self.evaluation(tmp_path), model, model)
        for protocol, number in _numbers(records):
            assert number.value == number.baseline, f"{number.name}, {protocol}: a model must equal itself, to the bit"
            assert number.delta == 0, f"{number.name}, {protocol}: a model beside itself must differ by exactly 0"
            assert number.flip_rate in (None, 0), f"{number.name}, {protocol}: nothing may flip beside itself"
        for record in records[0]:
            if (found := record.divergence) is not None:
                assert (found.kl.value, found.kl_reverse.value) == (0, 0), "KL of a model to itself must be exactly 0"
                assert found.top1_agreement.value == 1, "a model must agree with itself everywhere"

    def test_a_difference_is_that_of_the_two_numbers(self, tmp_path: Path) -> None:
        for protocol, number in _numbers(_run(self.evaluation(tmp_path), _model(), _variant())):
            assert number.baseline is not None, f"{number.name}, {protocol}: the original's number must be recorded"
            assert number.delta == number.value - number.baseline, f"{number.name}, {protocol}: value - baseline"
            if number.delta_low is not None and number.delta_high is not None:
                inside = number.delta_low <= number.delta <= number.delta_high
                assert inside, f"{number.name}, {protocol}: the interval must hold the difference"

    def test_without_an_original_there_is_no_difference(self, tmp_path: Path) -> None:
        evaluation = self.evaluation(tmp_path)
        for protocol, number in _numbers(evaluation.records(evaluation.score(_model(), None), None, False)):
            nothing = (number.baseline, number.delta, number.delta_low, number.delta_high) == (None,) * 4
            assert nothing, f"{number.name}, {protocol}: there is nothing to differ from"

    def test_it_is_deterministic(self, tmp_path: Path) -> None:
        first, second = (_run(self.evaluation(tmp_path), _model(), _variant()) for _ in range(2))
        assert first[:2] == second[:2], "the same request must give the same records, to the bit"
        assert first[2].keys() == second[2].keys(), "a file's name must be of its content"

    def test_an_original_that_was_kept_is_as_good_as_a_fresh_one(self, tmp_path: Path) -> None:
        evaluation, model, store = self.evaluation(tmp_path / "text"), _model(), Store(tmp_path / "outputs")
        fresh = evaluation.score_baseline(model)
        json.dumps(evaluation.identity)
        store.save_baseline("key", fresh, {"model": "m"})
        kept = store.load_baseline("key", {"model": "m"})
        assert kept is not None
        told = evaluation.records(evaluation.score(_variant(), kept), kept, False)
        expected = evaluation.records(evaluation.score(_variant(), fresh), fresh, False)
        assert told[:2] == expected[:2], "the original's scores must survive being kept as arrays by name"

    def test_what_is_kept_gives_the_number_again(self, tmp_path: Path) -> None:
        """Reports read intervals off what is kept, so that its mean must be the number that is shown."""
        evaluations, tasks, files = _run(self.evaluation(tmp_path), _model(), _variant())
        assert evaluations or tasks, "there must be a record"
        for record in evaluations:
            kept = files[record.window_nll_file]
            mean = np.average(kept["quantized"], weights=kept.get("tokens"))
            assert np.isclose(np.exp(mean), record.ppl), f"{record.protocol}: exp of the mean must be the perplexity"
        for record in tasks:
            for metric in record.metrics:
                filtered = metric.name if "," in metric.name else f"{metric.name},none"
                kept = files[record.scores_file].get(f"quantized/{record.task}/{filtered}")
                if kept is not None:
                    told = read_mean(metric.reading, kept.mean(dtype=float))
                    assert np.isclose(told, metric.value), f"{record.protocol}, {metric.name}: what documents add"

    def test_records_carry_the_name(self, tmp_path: Path) -> None:
        evaluation = self.evaluation(tmp_path)
        for protocol, number in _numbers(_run(evaluation, _model(), _model())):
            carried = protocol in str(evaluation.identity["protocol"])
            assert carried, f"{number.name}: recorded under {protocol}, which identity['protocol'] does not hold"

    def test_a_pass_finds_what_the_model_as_a_whole_gives(self, tmp_path: Path) -> None:
        """Answers `asks()` row by row, in fp64; an evaluation without it, or for which it is None, needs the model."""
        evaluation, protocol = self.evaluation(tmp_path), self.make(tmp_path)
        asks = getattr(evaluation, "asks", lambda: None)()
        if asks is None:
            return
        for ids in asks.batches:
            assert ids.ndim == 2, "a batch must be [rows, tokens]"
            assert ids.dtype == np.int64, "ids must be int64"
            assert ids.size, "a batch must hold tokens"
            assert ids.shape[1] <= protocol.window, "no sequence may be longer than window"
        original, variant = _model().double(), _variant().double()
        known = _walk(asks, original, None, original)
        walked = evaluation.records(_walk(asks, variant, known, original), known, False)
        whole = _run(evaluation, original, variant)
        for (name, ours), (_, theirs) in zip(_numbers(walked), _numbers(whole), strict=True):
            for what in ("value", "baseline", "delta_low", "flip_rate"):
                told, expected = (getattr(number, what) for number in (ours, theirs))
                near = expected if expected is None else pytest.approx(expected, rel=1e-7, abs=1e-9)
                assert told == near, f"{ours.name}, {name}: {what} of a pass"
        for ours, theirs in zip(walked[0], whole[0], strict=True):
            if theirs.divergence is not None:
                assert ours.divergence is not None, f"{ours.protocol}: a pass must find the divergence as well"
                assert ours.divergence.kl.value == pytest.approx(theirs.divergence.kl.value, rel=1e-7), ours.protocol
        for ours, theirs in zip(walked[2].values(), whole[2].values(), strict=True):
            assert ours.keys() == theirs.keys(), "a pass must keep what the whole model's scores leave beside a result"
            for name, values in theirs.items():
                assert np.allclose(ours[name], values, rtol=1e-7, atol=1e-9), f"{name}, kept beside a result"


def _model() -> Any:
    return tiny.build("dense", 0)[0].eval()


def _variant() -> Any:
    """The model with noise on its weights but the head's, seeded."""
    model, generator = _model(), torch.Generator().manual_seed(0)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight is not head):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1 * weight.std(correction=0))
    return model


def _run(evaluation: Evaluation, original: Any, variant: Any) -> Records:
    with torch.inference_mode():
        baseline = evaluation.score_baseline(original)
        return evaluation.records(evaluation.score(variant, baseline), baseline, False)


@torch.inference_mode()
def _walk(asks: Asks, model: Any, known: Scores | None, original: Any) -> Scores:
    """As a pass hands logits to a reader; `known` are the original's scores, None while it is the original's turn."""
    reader = asks.reader(known)
    for b, rows in enumerate(asks.batches):
        ids = torch.from_numpy(rows)
        own, beside = model(ids).logits, original(ids).logits if known is not None and asks.compares else None
        for row in range(len(rows)):
            reader.see(b, row, own[row], None if beside is None else beside[row])
    return reader.scores()


def _numbers(records: Records) -> Iterator[tuple[str, MetricRecord]]:
    """Every number with the protocol that it is recorded under."""
    for evaluation in records[0]:
        yield evaluation.protocol, evaluation.perplexity
        yield from ((evaluation.protocol, metric) for metric in evaluation.metrics)
    for task in records[1]:
        yield from ((task.protocol, metric) for metric in task.metrics)
