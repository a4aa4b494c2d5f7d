"""The command line: what it answers, refuses, records and skips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qbench import catalog
from qbench.record.result import Result
from qbench.record.store import PARTIAL
from tests import random_requests
from tests.conftest import refused

TINY = ("model=tiny-dense", "task.max_windows=3")


def recorded(folder: Path = Path("outputs")) -> list[Result]:
    return [Result.from_json(p.read_bytes()) for p in sorted((folder / "results").glob("*/result.json"))]


def test_a_point_ends_in_one_json_line_and_a_valid_result(qbench):
    outcome = qbench(*TINY, "quantizer.nbits=3")
    assert outcome.status == 0
    assert outcome.stdout.count("\n") == 1
    (result,) = recorded()
    assert outcome.summary == json.loads(json.dumps(result.summary()))
    assert result.status == "ok"
    assert result.command == [*TINY, "quantizer.nbits=3"]
    assert result.quantization.coverage == 1
    assert len(result.quantization.layers) == 14
    assert {row.method for row in result.quantization.layers} == {"sinq"}
    assert result.quantization.packed_bytes == sum(row.packed_bytes for row in result.quantization.layers)
    weights = sum(row.shape[0] * row.shape[1] for row in result.quantization.layers)
    assert result.quantization.bits_per_weight == 8 * result.quantization.packed_bytes / weights
    assert result.model.linear_weights == weights
    assert all(row.imbalance_after < row.imbalance_before for row in result.quantization.layers)
    assert set(result.seconds) == {"load", "baseline", "quantize", "evaluate"}
    assert "bits per weight" in outcome.stderr
    assert not list(Path().rglob(f"{PARTIAL}*"))


def test_a_finished_point_is_not_measured_again_unless_asked(qbench):
    first = qbench(*TINY)
    again = qbench(*TINY)
    assert again.summary == first.summary
    assert "already recorded" in again.stderr
    rerun = qbench(*TINY, "runtime.rerun=true")
    assert "already recorded" not in rerun.stderr
    assert rerun.summary["ppl"] == first.summary["ppl"]
    assert len(recorded()) == 1
    other = qbench(*TINY, "quantizer.group_size=32")
    assert other.summary["run_id"] != first.summary["run_id"]


def test_the_baseline_is_measured_once_and_shared(qbench):
    qbench(*TINY)
    qbench(*TINY, "quantizer=rtn")
    assert len(list(Path("outputs/baselines").iterdir())) == 2  # its scores, and its last hidden states
    assert sorted(r.evaluation[0].baseline_cached for r in recorded()) == [False, True]
    assert len({r.evaluation[0].baseline_ppl for r in recorded()}) == 1


def by_size(path):
    return path.stat().st_size


@pytest.mark.slow
def test_a_baseline_file_of_another_model_is_refused(qbench):
    """Whoever copies baselines between folders is told, instead of being compared with the wrong model."""
    qbench(*TINY)
    qbench(*TINY, "model.seed=1", "outputs=other")
    for ours, theirs in zip(
        *(sorted(Path(f"{o}/baselines").iterdir(), key=by_size) for o in ("outputs", "other")), strict=True
    ):
        kept = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        outcome = qbench(*TINY, "quantizer=rtn")
        sentence = refused(outcome, names=[str(ours), "random:1:dense:seed1", "random:1:dense:seed0"])
        assert "remove the file" in sentence
        assert len(recorded()) == 1
        ours.write_bytes(kept)


def test_divergence_from_the_baseline_is_recorded_and_can_be_switched_off(qbench):
    summary = qbench(*TINY, "quantizer.nbits=3").summary
    (result,) = recorded()
    assert summary["kl"] == result.evaluation[0].divergence.kl.value > 0
    assert 0 < summary["top1_agreement"] < 1
    assert result.evaluation[0].verdict in ("worse", "not distinguishable")
    without = qbench(*TINY, "quantizer.nbits=3", "task.divergence=false").summary
    assert "kl" not in without
    assert without["ppl"] == summary["ppl"]
    assert without["run_id"] != summary["run_id"]


@pytest.mark.slow
def test_what_cannot_change_a_number_does_not_change_the_point(qbench, tmp_path):
    first = qbench(*TINY, "tracker=none").summary["run_id"]
    assert qbench(*TINY, "outputs=elsewhere").summary["run_id"] == first
    assert qbench(*TINY, "runtime.device=cpu", "runtime.dtype=float32").summary["run_id"] == first
    assert qbench(*TINY, "runtime.dtype=bfloat16").summary["run_id"] != first


@pytest.mark.slow
def test_wandb_tracks_the_point(qbench):
    pytest.importorskip("wandb", reason="pip install 'qbench-llm[wandb]'")
    outcome = qbench(*TINY, "tracker=wandb", "tracker.mode=offline")
    assert outcome.status == 0
    assert "Weights & Biases failed" not in outcome.stderr
    (folder,) = Path("outputs/wandb").glob("offline-run-*")
    assert folder.name.endswith(outcome.summary["run_id"])


# The arguments, the key (or group) that the refusal names, and what else it names: legal values, or what to do instead.
LONG = "é" * 150  # 300 bytes, and a file name takes 255
BAD = [
    (["quantizer=sink"], "quantizer", ["'sink'", "sinq", "rtn"]),
    (["model=qwen3-8c"], "model", ["'qwen3-8c'", "qwen3-8b"]),
    (["task=wikitext"], "task", ["'wikitext'", "wikitext2"]),
    (["quantizer.nbit=3"], "quantizer.nbit", ["quantizer.nbits"]),
    (["runtime.devise=cpu"], "runtime.devise", ["runtime.device"]),
    (["colour=red"], "colour", []),
    (["+quantizer.colour=red"], "quantizer.colour", []),
    (["quantizer.nbits=1"], "quantizer.nbits", ["2, 3, 4, 8", "got 1"]),
    (["quantizer.nbits=5"], "quantizer.nbits", ["2, 3, 4, 8", "got 5"]),
    (["quantizer.nbits=4.0"], "quantizer.nbits", ["4.0"]),
    (["model.seed=abc"], "model.seed", ["'abc' is no whole number"]),
    (["model=local", "model.trust_remote_code=maybe"], "model.trust_remote_code", ["neither true nor false"]),
    (["model=qwen3-8b", "model.seed=1"], "model.seed", ["model.id", "model.revision"]),
    (["+model.path=here"], "model.path", ["model.architecture", "model.seed"]),
    (["model.source=hubb"], "model.source", ["'hubb'", "hub, local, packed"]),
    (["+export.level=9"], "export.level", ["export.format=packed", "leave it out"]),
    (["export.dir=[a]"], "export.dir", ["no text"]),
    (["quantizer.group_size=0"], "quantizer.group_size", []),
    (["quantizer.aux_dtype=fp8"], "quantizer.aux_dtype", ["fp16", "int8"]),
    (["model=local"], "model.path=DIR", []),
    (["model=local", "model.path=nowhere"], "model.path=nowhere", []),
    (["task.path=nowhere.txt"], "task.path=nowhere.txt", []),
    (["task.window=100000"], "task.window", ["100000"]),
    (["task.max_windows=1000"], "task.max_windows", ["1000"]),
    (["task=lmeval"], "task.names", []),
    (["task=lmeval", "task.names=[piqa]", "task.limit=0"], "task.limit", ["at least 1"]),
    (["task=text"], "task.path=FILE", []),
    (["task=c4_gptq", "task.path=file"], "file", ["line 1", "JSON"]),
    (["task=c4_new"], "task.path=FILE", []),
    (["runtime.batch_size=many"], "runtime.batch_size", ["many", "Integer"]),
    (["runtime.batch_size=0"], "runtime.batch_size", ["at least 1"]),
    (["runtime.dtype=float8"], "runtime.dtype", ["'float8'", "bfloat16"]),
    (["runtime.device=tpu"], "runtime.device", ["'tpu'", "cpu", "cuda"]),
    (["outputs=file/below"], "outputs=file/below", []),
    (["a b"], "KEY=VALUE", []),
    (["tracker=wandb", "tracker.mode=sometimes"], "tracker.mode", ["online", "offline", "disabled"]),
    (["task=wikitext2"], "task.path=FILE", []),
    (["+task.apply_chat_template=true"], "task.apply_chat_template", []),
    (["++runtime.min_covrage=1"], "runtime.min_covrage", ["runtime.min_coverage"]),
    (["+anything=1"], "anything", []),
    (["task.path=a (copy)/t.txt"], "task.path", ["""'task.path="a (copy)/t.txt"'"""]),
    (["task.path=k=v"], "task.path", ["""'task.path="k=v"'"""]),
    (["task.path=n\u00e4her"], "task.path", ["quote"]),
    (["speed=1"], "speed", ["'1'", "default", "none"]),
    (["task=nan"], "task", ["'nan'", "mini"]),
    (["quantizer=null"], "quantizer", ["'null'", "rtn"]),
    (["quantizer=[rtn]"], "quantizer", ["'[rtn]'", "rtn"]),
    (["~quantizer=inf"], "quantizer", []),
    (["~task"], "task", []),
    (["model@x=rtn"], "model@x", ["@PACKAGE"]),
    (["=1"], "=1", []),
    (["@=1"], "@=1", []),
    (["--colour"], "--colour", []),
    (["--experimental-rerun=x"], "--experimental-rerun", []),
    (["model=tiny-dense", "model.seed=99999999999999999999999"], "seed", ["64 bits"]),
    (["tracker.project=mine"], "tracker.project", []),
    (["experiment=null"], "experiment", ["'null'", "demo"]),
    (["+hydra.sweeper.parms=1"], "hydra.sweeper.parms", ["hydra.sweeper.params"]),
    (["+hydra.launcher.jobs=1"], "hydra.launcher.jobs", []),
    (["++hydra.sweeps.dir=x"], "hydra.sweeps.dir", []),
    (["hydra.swep.dir=x"], "hydra.swep.dir", []),
    ([f'calibration="{LONG}"'], "calibration", ["wikitext2"]),
    ([f'calibration=choice(mini,"{LONG}")'], "calibration", ["wikitext2"]),
    ([f'hydra/launcher="{LONG}"'], "hydra/launcher", []),
    (['calibration.revision="\udc80x"'], "calibration.revision", ["UTF-8"]),
    ([f"task.name={'x' * 300}"], "task", ["task.path"]),
    (["task.name=../texts/mini"], "task", ["task.path"]),
    (["task=text", f"task.path={'x' * 300}"], None, ["255 bytes"]),
    (["model=local", f"model.path={'x' * 300}"], None, ["255 bytes"]),
    (["quantizer=gptq", f"calibration.path={'x' * 300}"], None, ["255 bytes"]),
    ([f"export.dir={'x' * 300}"], None, ["255 bytes"]),
    (["task=lmeval", "task.names=[wikitext]", f"task.include_path={'x' * 300}"], None, ["255 bytes"]),
]


@pytest.mark.parametrize(("arguments", "key", "named"), BAD, ids=[ascii(arguments[0][:80]) for arguments, *_ in BAD])
def test_wrong_requests_get_one_sentence_and_exit_2(qbench, arguments, key, named):
    Path("file").write_text("in the way")
    model = [] if any(a.startswith("model=") for a in arguments) else ["model=tiny-dense"]
    refused(qbench(*model, *arguments), key=key, names=named)
    assert not list(Path().rglob("result.json"))


GOOD = "# @package _global_\ndefaults:\n  - override /model: tiny-dense\n"
GOOD += "hydra:\n  sweeper:\n    params: {quantizer: 'rtn,nf4'}\n"
EXPERIMENTS = [
    (GOOD.replace("\n", "\r\n").encode(), None),
    (b"\xef\xbb\xbf" + GOOD.encode(), "begins with a byte order mark"),
    (GOOD.replace("  sweeper", "\tsweeper").encode(), "line 5, column 1"),
    (b"", "is empty"),
    (b"- 1\n", "holds a list"),
    (GOOD.encode() + b"\xe9: 1\n", "is not UTF-8 text"),
    (GOOD.encode() + b"colour: 1\n", "unknown key 'colour'"),
    (
        GOOD.replace("params", "parms").encode(),
        "unknown key 'hydra.sweeper.parms'; did you mean 'hydra.sweeper.params'?",
    ),
    (GOOD.replace("{quantizer: 'rtn,nf4'}", "[rtn]").encode(), "hydra.sweeper.params must be a mapping, got list"),
    (GOOD.partition("\n")[2].encode(), "its first line must be '# @package _global_'"),
    (GOOD.encode() + b"runtime: {devise: cpu}\n", "devise"),
]


@pytest.mark.parametrize(("content", "sentence"), EXPERIMENTS, ids=[str(s) for _, s in EXPERIMENTS])
def test_an_experiment_of_ones_own_is_answered_with_its_name(qbench, content, sentence):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/odd.yaml").write_bytes(content)
    outcome = qbench("-m", "--config-dir", "mine", "experiment=odd", "--dry-run")
    if sentence is None:
        assert (outcome.status, outcome.summary["points"]) == (0, 2)
        return
    assert outcome.status == 2
    (line,) = outcome.stderr.splitlines()
    assert sentence in line
    assert "odd" in line


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from qbench import entry
from qbench.__main__ import main
entry.leave(main)
"""


@pytest.mark.slow
def test_a_full_disk_costs_what_has_no_room(tmp_path):
    """The kept states of the original take 0.1 MB, the result 15 KB."""
    for room, status in ((100_000, 0), (8_000, 1)):
        arguments = [str(room), *TINY, "quantizer=rtn", f"outputs={room}"]
        done = subprocess.run([sys.executable, "-c", FULL, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert f"the reference is not kept in {room}/baselines (File too large)" in done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        assert summary["status"] == ("ok" if status == 0 else "failed")
    assert "it was measured, but not recorded in 8000/results/" in summary["error"]
    assert not list(tmp_path.rglob(f"{PARTIAL}*"))


def test_a_reader_that_has_seen_enough_ends_no_command_in_a_traceback():
    for module in ("qbench", "qbench.catalog"):
        command = [sys.executable, "-m", module, *(["--help"] if module == "qbench" else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
        process.stderr.close()


@pytest.mark.slow
def test_random_requests_are_answered():
    counts = random_requests.check(seed=7, count=60)
    assert counts["faults"] == 0
    assert counts["exit 0"] > 0
    assert counts["exit 2"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(qbench):
    refused(qbench("model=tiny-dense", "runtime.device=cuda"), key="runtime.device", names=["runtime.device=cpu"])


def saved_tiny(folder: Path, spoil=lambda model: None) -> Path:
    from qbench.sources.tiny import build

    model, tokenizer = build("dense", 0)
    with torch.no_grad():
        spoil(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_nan_weight_fails_the_point_by_name_and_is_recorded(qbench, tmp_path):
    def spoil(model):
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")

    folder = saved_tiny(tmp_path / "bad", spoil)
    outcome = qbench("model=local", f"model.path={folder}", "task.max_windows=1")
    assert outcome.status == 1
    (result,) = recorded()
    assert result.status == "failed"
    assert result.error.startswith("layer model.layers.1.mlp.up_proj: 1 of 12288 weights are NaN or Inf")
    assert result.error in outcome.stderr.replace("\n", " ")
    assert "Traceback" not in outcome.stderr


def test_a_corrupt_model_file_is_refused(qbench, tmp_path):
    folder = saved_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    outcome = qbench("model=local", f"model.path={folder}", "task.max_windows=1")
    assert outcome.status == 2
    assert "model.safetensors is truncated" in refused(outcome)
    assert not recorded()


def test_a_mixture_is_quantized_expert_by_expert(qbench):
    outcome = qbench("model=tiny-moe", "task.max_windows=1")
    assert outcome.status == 0
    (result,) = recorded()
    done = result.quantization
    assert 0.99 < done.coverage < 1  # the routers stay
    assert len(done.layers) == 2 * (4 + 4 * 3)
    assert {row.shape for row in done.layers if ".experts.3.gate_proj" in row.name} == {(96, 64)}
    assert done.packed_bytes == sum(row.packed_bytes for row in done.layers)
    weights = sum(row.shape[0] * row.shape[1] for row in done.layers)
    assert done.bits_per_weight == 8 * done.packed_bytes / weights
    assert done.model_bytes == done.packed_bytes + 2 * (result.model.parameters - weights)
    assert result.model.linear_weights == weights + sum(row.weights for row in done.skipped)


def test_low_coverage_is_refused_with_the_names_of_what_was_left_out(qbench, monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def forward(self, hidden_states, top_k_index, top_k_weights, temperature=None):
        return usual(self, hidden_states, top_k_index, top_k_weights)

    usual = Qwen3MoeExperts.forward
    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    plan = qbench("model=tiny-moe", "task.max_windows=1", "--dry-run")
    assert plan.status == 0
    [planned] = plan.summary["plan"]
    assert planned["coverage"] < 0.5
    assert planned["refused"] in plan.stderr.replace("\n", " ")
    assert "will fail" in plan.stderr
    outcome = qbench("model=tiny-moe", "task.max_windows=1")
    assert outcome.status == 1
    assert outcome.summary["error"] == planned["refused"]
    assert "of the linear weights can be quantized" in outcome.summary["error"]
    assert recorded()[0].seconds.keys() == {"load"}  # no baseline, no quantizing
    assert "experts.gate_up_proj (fused experts of an unknown layout: Qwen3MoeExperts" in outcome.summary["error"]
    assert qbench("model=tiny-moe", "task.max_windows=1", "runtime.min_coverage=0.1").status == 0


def test_a_quantizer_that_breaks_its_contract_fails_the_point(monkeypatch):
    from dataclasses import dataclass

    from qbench.errors import PointError
    from qbench.passes.quantize import quantize_linears
    from qbench.quant.quantizer import Quantizer
    from qbench.quant.rounding import round_to_nearest

    @dataclass(frozen=True)
    class Transposed(Quantizer):
        def quantize_one(self, weight, stats=None):
            return round_to_nearest(weight.T, nbits=4, group_size=8)

    with pytest.raises(PointError, match=r"returned the shape \[16, 8\] for a weight \[8, 16\]"):
        quantize_linears({"x": torch.nn.Linear(16, 8)}, Transposed())


def test_results_hold_no_secrets_and_no_folders(qbench, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t" * 7)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    qbench(*TINY)
    (path,) = Path("outputs/results").glob("*/result.json")
    assert "s3cr3t" not in path.read_text()
    assert str(Path.home()) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["qbench.config", "qbench.registry", "qbench.catalog", "qbench.__main__"])
def test_the_command_line_layer_imports_nothing_heavy(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'lm_eval', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_catalog_name_every_choice():
    for arguments in (["-m", "qbench", "--help"], ["-m", "qbench.catalog"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        for word in ("sinq", "rtn", "qwen3-8b", "deepseek-v2.5", "wikitext2", "mini", "wandb"):
            assert word in done.stdout
    assert "multiplies packed weights by: " in done.stdout


def test_the_catalog_takes_no_argument(capsys):
    with pytest.raises(SystemExit, match="2"):
        catalog.main(["gptq"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("unrecognized arguments: gptq")
