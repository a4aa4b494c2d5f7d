"""The regression gate: what turns it red, for which reason, and what does not."""

import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch

from qbench.format.aux import Aux
from qbench.format.weight import QuantizedWeight
from qbench.plugins.sinq import SINQ
from qbench.quant.diagnostics import mean_imbalance
from qbench.quant.rounding import round_to_nearest
from qbench.regress import main
from qbench.report.gate.file import GateFile
from tests.report.examples import BASELINE, failed, nll, point, save, tasked, with_identity

TINY = ("model=tiny-dense", "task.max_windows=3")


@pytest.fixture
def gate(capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def call(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def gate_file(tmp_path, gate):
    """A gate file of two points, made from results."""
    outputs = save(tmp_path / "before", point("sinq", 4, nll(0.2, 1)), point("rtn", 4, nll(0.3, 2)))
    path = tmp_path / "gate.json"
    assert gate(path, outputs, "--update")[0] == 0
    return path


def regressions(summary):
    """Check -> message of everything under `Regressions`."""
    section = summary.partition("### Regressions")[2].partition("\n### ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    return {check: message for _, check, _, message in cells}


def changed(quantizer="sinq", windows=None, **changes):
    result, scores = point(quantizer, 4, nll(0.2, 1) if windows is None else windows, version="0.2.0", day=5)
    return replace(result, quantization=replace(result.quantization, **changes)), scores


def layers_with(index, **changes):
    result, _ = point("sinq", 4)
    rows = list(result.quantization.layers)
    rows[index] = replace(rows[index], **changes)
    return rows


RTN = ("rtn", 4, nll(0.3, 2))


def with_codebook(measured):
    return with_identity(measured, quantizer={"codebook": "nf4"})


def test_an_equal_measurement_by_a_later_version_passes(gate_file, tmp_path, gate):
    outputs = save(tmp_path / "now", changed(), point(*RTN, version="0.2.0", day=5))
    status, out, err = gate(gate_file, outputs)
    assert (status, err) == (0, "")
    assert "gate: passed" in out
    assert regressions(out) == {}


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        ({"windows": nll(0.2, 1) + 0.02}, "ppl, mini:gptq-w512", "allowed"),
        ({"packed_bytes": 1}, "bytes", "to 1 "),
        ({"model_bytes": 1}, "bytes", "in all"),
        ({"bits_per_weight": 4.625}, "bits per weight", "4.5 to 4.625"),
        ({"coverage": 0.97}, "coverage", "100.0000% to 97.0000%"),
        ({"layers": layers_with(3, relative_error=0.0918)}, "weight error", "1 of 24 layers"),
        ({"layers": layers_with(3, relative_error=float("nan"))}, "weight error", "1 of 24 layers"),
        ({"layers": layers_with(3, imbalance_after=1.6)}, "imbalance", "+6.67%"),
        ({"layers": layers_with(3, imbalance_after=None)}, "imbalance", "1.5 to none"),
        ({"layers": layers_with(3, method="rtn")}, "method", "1 of 24 layers ran rtn, not sinq"),
        ({"layers": layers_with(3)[:-1]}, "method", "1 of 24 layers are not quantized any more"),
    ],
)
def test_what_got_worse_is_named_and_nothing_else(gate_file, tmp_path, gate, change, check, words):
    status, out, _ = gate(gate_file, save(tmp_path / "now", changed(**change), point(*RTN)))
    assert status == 1
    found = regressions(out)
    assert list(found) == [check]
    assert words in found[check].replace("\\", "")


def test_worse_inside_the_noise_or_inside_the_allowance_is_no_regression(gate_file, tmp_path, gate):
    noisy = changed(windows=nll(0.202, 9, noise=0.05))
    assert gate(gate_file, save(tmp_path / "noisy", noisy, point(*RTN)))[0] == 0
    tiny = changed(windows=nll(0.2, 1) + 0.003)  # every window: the interval excludes zero by far
    assert gate(gate_file, save(tmp_path / "tiny", tiny, point(*RTN)))[0] == 0


def test_a_quality_that_is_no_number_any_more_is_a_regression(gate_file, tmp_path, gate):
    result, scores = changed()
    broken = replace(result, evaluation=[replace(result.evaluation[0], ppl=float("nan"))])
    status, out, _ = gate(
        gate_file, save(tmp_path / "now", (broken, scores | {"quantized": BASELINE * np.nan}), point(*RTN))
    )
    assert status == 1
    assert regressions(out)["ppl, mini:gptq-w512"].endswith(" to nan")
    unread, _ = changed()
    status, out, _ = gate(gate_file, save(tmp_path / "lost", (unread, {"other": BASELINE}), point(*RTN)))
    assert status == 2
    assert "cannot be read" in regressions(out)["ppl, mini:gptq-w512"]


def test_better_is_a_note(gate_file, tmp_path, gate):
    status, out, _ = gate(gate_file, save(tmp_path / "now", changed(windows=nll(0.1, 1)), point(*RTN)))
    assert status == 0
    assert "| note |" in out


def test_missing_and_failed_points(gate_file, tmp_path, gate):
    outputs = save(tmp_path / "now", changed())
    status, out, _ = gate(gate_file, outputs)
    assert status == 2
    assert regressions(out) == {"point": "it was not measured"}
    words = ["model=example", "quantizer=rtn", "quantizer.nbits=4"]
    save(outputs, failed([*words, "quantizer.codebook=nf4"], "another point", of=with_codebook(point(*RTN))[0]))
    assert gate(gate_file, outputs)[0] == 2
    save(outputs, failed(words, "out of memory", of=point(*RTN)[0]))
    status, out, _ = gate(gate_file, outputs)
    assert status == 1
    assert regressions(out) == {"point": "it failed: out of memory"}
    save(outputs, point(*RTN, day=9))
    assert gate(gate_file, outputs)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "random:other"}, "weights=random:other instead of random:example"),
        ({"text_sha256": "cd" * 32}, "task.text_sha256=cdcdcdcd instead of ab"),
        ({"quantizer": {"codebook": "nf4"}}, "quantizer.codebook=nf4 instead of null"),
        ({"quantizer": {"a_field_of_a_later_version": 1}}, "quantizer.a_field_of_a_later_version=1 instead of null"),
        ({"protocol": {"max_windows": 4}}, "task.max_windows=4 instead of null"),
        ({"runtime": {"batch_size": 8}}, "runtime.batch_size=8 instead of 1"),
        ({"quantizer": {"a": 1, "b": 2, "c": 3}}, "it was not measured"),
    ],
)
def test_another_measurement_does_not_stand_in_for_a_point(gate_file, tmp_path, gate, change, words):
    """The point is missing, and neither compared nor overwritten, however alike the two are asked for."""
    outputs = save(tmp_path / "now", with_identity(changed(packed_bytes=1), **change), point(*RTN))
    status, out, _ = gate(gate_file, outputs)
    assert status == 2
    found = regressions(out)
    assert list(found) == ["point"]
    assert found["point"].replace("\\", "").endswith(words)
    assert out.count("not in the gate file; --update would add it") == 1
    before = {point.identity.key for point in GateFile.read(gate_file).points}
    assert gate(gate_file, outputs, "--update", "--where", "quantizer=sinq")[0] == 0
    after = {point.identity.key for point in GateFile.read(gate_file).points}
    assert before < after
    assert len(after) == 3


def test_windows_of_other_tokens_are_not_paired(gate_file, tmp_path, gate):
    result, scores = changed()
    other = replace(result, evaluation=[replace(result.evaluation[0], token_ids_sha256="another")])
    status, out, _ = gate(gate_file, save(tmp_path / "text", (other, scores), point(*RTN)))
    assert status == 2
    assert "nothing can be paired" in out


def test_a_point_is_known_by_its_identity(gate_file, tmp_path, gate):
    result, scores = changed()
    result.config["task"]["a_key_of_a_later_version"] = 1
    result.config["runtime"] |= {"threads": 8, "min_coverage": 0.5}
    result.config["model"] |= {"path": "elsewhere", "name": "another"}
    renamed = replace(result, run_id="f" * 16, command=["quantizer=sinq"], model=replace(result.model, name="another"))
    assert gate(gate_file, save(tmp_path / "now", (renamed, scores), point(*RTN)))[0] == 0


def test_update_is_deterministic_and_keeps_limits(gate_file, tmp_path, gate):
    first = gate_file.read_bytes()
    assert gate(gate_file, tmp_path / "before", "--update")[0] == 0
    assert gate_file.read_bytes() == first
    document = json.loads(first)
    document["limits"] |= {"quality": 0.1, "seconds_ratio": 2.0}
    gate_file.write_text(json.dumps(document))
    assert gate(gate_file, tmp_path / "before", "--update")[0] == 0
    limits = GateFile.read(gate_file).limits
    assert (limits.quality, limits.seconds_ratio) == (0.1, 2.0)
    result, scores = changed(windows=nll(0.25, 1), quant_seconds=4.1)
    status, out, _ = gate(gate_file, save(tmp_path / "slow", (result, scores), point(*RTN)))
    assert status == 1
    assert list(regressions(out)) == ["seconds"]


def test_a_gate_file_of_an_earlier_version_leaves_its_limits(gate_file, tmp_path, gate):
    document = json.loads(gate_file.read_text())
    gate_file.write_text(json.dumps(document | {"schema_version": 1, "limits": document["limits"] | {"quality": 0.1}}))
    for arguments in ((), ("--update", "--where", "quantizer=sinq")):
        status, _, err = gate(gate_file, tmp_path / "before", *arguments)
        assert status == 2
        assert "schema_version: it is of version 1; --update writes it anew and keeps its limits" in err
    status, _, err = gate(gate_file, tmp_path / "before", "--update")
    assert status == 0
    assert "only its limits are kept" in err
    assert GateFile.read(gate_file).limits.quality == 0.1
    assert len(GateFile.read(gate_file).points) == 2


def test_a_part_can_be_gated_and_updated(gate_file, tmp_path, gate):
    outputs = save(tmp_path / "now", changed(windows=nll(0.4, 1)))
    assert gate(gate_file, outputs, "--where", "quantizer=sinq")[0] == 1
    assert gate(gate_file, outputs, "--where", "quantizer=sinq", "--update")[0] == 0
    assert gate(gate_file, outputs, "--where", "quantizer=sinq")[0] == 0
    assert len(GateFile.read(gate_file).points) == 2
    status, _, err = gate(gate_file, outputs, "--update")
    assert status == 0
    assert "no longer in the gate file" in err
    assert len(GateFile.read(gate_file).points) == 1


def test_accuracies_regress_downwards(tmp_path, gate):
    right = (np.arange(400) % 4 != 0).astype(float)
    path = tmp_path / "gate.json"
    status, _, err = gate(path, save(tmp_path / "before", tasked("sinq", right)), "--update")
    assert status == 0
    assert "f1" in err  # nothing to pair: said, and left out
    assert gate(path, tmp_path / "before")[0] == 0
    few = right.copy()
    few[1:6] = 0
    assert gate(path, save(tmp_path / "few", tasked("sinq", few, day=2)))[0] == 0
    status, out, _ = gate(path, save(tmp_path / "many", tasked("sinq", right * (np.arange(400) % 9 != 1), day=2)))
    assert status == 1
    assert list(regressions(out)) == ["acc, lmeval:pair-v1-0shot"]
    better = save(tmp_path / "better", tasked("sinq", np.ones(400), day=2))
    assert gate(path, better)[0] == 0


def test_junit_and_the_step_summary(gate_file, tmp_path, gate, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    hostile = replace(changed(packed_bytes=1)[0], command=["quantizer=<&\x00\x1b|`"])
    outputs = save(tmp_path / "now", (hostile, changed()[1]))
    status, out, _ = gate(gate_file, outputs, "--junit", tmp_path / "reports" / "gate.xml")
    assert status == 1
    assert summary.read_text() == "before\n" + out + "\n"
    suite = ET.parse(tmp_path / "reports" / "gate.xml").getroot()
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases))
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    assert [case.get("name") for case in cases if case.find("failure") is not None] == ["bytes"]
    assert [case.get("name") for case in cases if case.find("error") is not None] == ["point"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a gate file of schema version 2"),
        ('{"points": [], "schema_version": 3}', "schema_version: it is of version 3"),
        ('{"points": [], "limits": {"quallity": 1}}', "limits.quallity"),
        ('{"points": []}', "holds no points"),
        (None, "cannot read the gate file"),
    ],
)
def test_wrong_gate_files(tmp_path, gate, content, words):
    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_text(content)
    status, out, err = gate(path, save(tmp_path / "outputs", changed()))
    assert (status, out) == (2, "")
    assert words in err


def test_nothing_to_update_from(tmp_path, gate):
    assert gate(tmp_path / "b.json", tmp_path, "--update")[0] == 2
    outputs = save(tmp_path / "outputs", changed(), failed(["quantizer=rtn"], "out of memory"))
    status, _, err = gate(tmp_path / "b.json", outputs, "--update")
    assert status == 2
    assert "no gate file from failed points" in err
    assert not (tmp_path / "b.json").exists()


def as_rtn(self, weights, stats=None):
    """What RTN does, and says so."""
    return [
        round_to_nearest(weight, nbits=self.nbits, group_size=self.columns(weight), method="rtn") for weight in weights
    ]


def as_rtn_in_disguise(self, weights, stats=None):
    """RTN that claims to be SINQ and stores a second scale that does nothing."""
    return [
        round_to_nearest(
            weight,
            nbits=self.nbits,
            group_size=self.columns(weight),
            input_scale=torch.ones(weight.shape[1]),
            method="sinq",
            diagnostics={"imbalance_after": float(mean_imbalance(weight, self.group_size))},
        )
        for weight in weights
    ]


def one_layer_off(factor):
    """SINQ whose fifth layer has scales that are too large or too small by a factor."""
    honest, done = SINQ.quantize, []

    def quantize(self, weights, stats=None):
        results = honest(self, weights, stats)
        for index, result in enumerate(results):
            done.append(result)
            if len(done) == 5:
                scale = Aux.compress(result.scale.dense() * factor, self.aux_dtype)
                results[index] = replace(result, scale=scale)
        return results

    return quantize


@pytest.mark.slow
class TestPlantedRegressions:
    """Real points of the tiny model, measured by a quantizer that has gone wrong in one way."""

    @pytest.fixture
    def tiny_gate_file(self, qbench, gate, tmp_path_factory):
        """Measured once for all tests of the class."""
        kept = tmp_path_factory.getbasetemp() / "tiny-gate.json"
        if not kept.exists():
            assert qbench(*TINY).status == 0
            assert gate(kept, "outputs", "--update")[0] == 0
        shutil.copy(kept, "gate.json")

    def gate_again(self, qbench, gate):
        assert qbench(*TINY, "outputs=again").status == 0
        status, out, _ = gate("gate.json", "again")
        return status, regressions(out)

    def test_none(self, tiny_gate_file, qbench, gate):
        assert self.gate_again(qbench, gate) == (0, {})

    def test_rtn_presented_as_sinq(self, tiny_gate_file, qbench, gate, monkeypatch):
        monkeypatch.setattr(SINQ, "quantize", as_rtn)
        status, found = self.gate_again(qbench, gate)
        assert status == 1
        assert "14 of 14 layers ran rtn, not sinq" in found["method"]
        assert "to none" in found["imbalance"]
        assert "in 14 of 14 layers" in found["bytes"]  # no second scale is stored

    def test_rtn_in_disguise(self, tiny_gate_file, qbench, gate, monkeypatch):
        monkeypatch.setattr(SINQ, "quantize", as_rtn_in_disguise)
        status, found = self.gate_again(qbench, gate)
        assert status == 1
        assert "14 of 14 layers" in found["imbalance"]
        assert not {"method", "bytes", "bits per weight"} & found.keys()

    @pytest.mark.parametrize("factor", [1.02, 0.98])
    def test_one_layers_scale_off_by_two_percent(self, tiny_gate_file, qbench, gate, monkeypatch, factor):
        monkeypatch.setattr(SINQ, "quantize", one_layer_off(factor))
        status, found = self.gate_again(qbench, gate)
        assert status == 1
        assert list(found) == ["weight error"]
        assert "1 of 14 layers" in found["weight error"]

    def test_one_more_byte_per_group(self, tiny_gate_file, qbench, gate, monkeypatch):
        honest = QuantizedWeight.stored_bytes
        counted = lambda self: honest(self) | {"more": self.scale.stored.numel()}  # noqa: E731
        monkeypatch.setattr(QuantizedWeight, "stored_bytes", counted)
        monkeypatch.setattr(QuantizedWeight, "nbytes", property(lambda self: sum(counted(self).values())))
        status, found = self.gate_again(qbench, gate)
        assert status == 1
        assert set(found) == {"bytes", "bits per weight"}
        before, after = map(float, found["bits per weight"].split(" to "))
        assert after - before == pytest.approx(8 / 64)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["sinq", "hqq", "gptq", "awq"])
def test_honest_reruns_with_other_thread_counts_stay_green(qbench, gate, quantizer):
    point = (*TINY, f"quantizer={quantizer}")
    threads = torch.get_num_threads()
    try:
        assert qbench(*point, "runtime.threads=1").status == 0
        assert gate("gate.json", "outputs", "--update")[0] == 0
        for count in range(1, 11):
            assert qbench(*point, f"runtime.threads={count}", f"outputs=with-{count}").status == 0
            status, out, _ = gate("gate.json", f"with-{count}")
            assert status == 0, out
    finally:
        torch.set_num_threads(threads)
