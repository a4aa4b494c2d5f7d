"""Models of the Hub, from a stand-in on the loopback: which commit, which files, and never a folder of its name."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qbench.sources.hub import Hub, commit
from qbench.sources.tiny import build
from tests.conftest import refused
from tests.sources.hub_server import serving

SHORT = ("quantizer=rtn", "task.max_windows=1", "task.window=64", "task.divergence=false")
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture
def saved(tmp_path):
    """seed -> a tiny model's folder with what such repositories hold besides."""

    def save(seed):
        folder = tmp_path / f"seed{seed}"
        model, tokenizer = build("dense", seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "original").mkdir()
        for name in ("pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "modeling_x.py"):
            (folder / name).write_bytes(b"not asked for")
        for name in ("README.md", "README.txt", "trainer_state.json", "original/params.json", "original/t.model"):
            (folder / name).write_bytes(b"not asked for")
        return folder

    return save


@pytest.fixture
def hub():
    with serving() as found:
        yield found


@pytest.fixture
def run(tmp_path, hub):
    """A command line in a process of its own, which is not told to stay offline."""
    work = tmp_path / "work"
    work.mkdir()

    def call(*arguments, module="qbench", **more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **more}
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        return done.returncode, json.loads(lines[-1]) if lines else None, done.stderr

    return call


def recorded(tmp_path, run_id):
    return json.loads((tmp_path / "work/outputs/results" / run_id / "result.json").read_text())


@pytest.mark.slow
def test_any_repository_is_measured_at_the_commit_that_its_branch_is_at(tmp_path, hub, run, saved):
    first = hub.push("org/tiny", saved(0))
    decoy = tmp_path / "work/org/tiny"  # what `hf download --local-dir org/tiny` leaves behind
    shutil.copytree(saved(7), decoy)
    status, one, stderr = run("model=org/tiny", *SHORT)
    assert status == 0, stderr
    result = recorded(tmp_path, one["run_id"])
    assert result["model"]["name"] == "org/tiny"
    assert result["model"]["fingerprint"] == f"hub:org/tiny@{first}"
    assert result["config"]["model"]["revision"] == first
    assert set(hub.fetched) == NEEDED

    shutil.rmtree(decoy)
    status, here, stderr = run("model=local", f"model.path={tmp_path / 'seed0'}", *SHORT)
    assert here["ppl"] == one["ppl"]  # of the repository, not of the folder of its name

    _, _, stderr = run("model=org/tiny", "model.revision=main", *SHORT)
    assert "already recorded" in stderr  # a branch's name is not part of the point
    _, _, stderr = run("model=org/tiny", f"model.revision={first}", *SHORT, HF_HUB_OFFLINE="1")
    assert "already recorded" in stderr
    status, offline, stderr = run("model=org/tiny", *SHORT, "quantizer.nbits=8", HF_HUB_OFFLINE="1")
    assert (status, recorded(tmp_path, offline["run_id"])["config"]["model"]["revision"]) == (0, first)

    second = hub.push("org/tiny", saved(1))  # the repository moves
    status, two, stderr = run("model=org/tiny", *SHORT)
    assert status == 0, stderr
    assert two["run_id"] != one["run_id"]
    assert two["ppl"] != one["ppl"]
    assert recorded(tmp_path, two["run_id"])["model"]["fingerprint"] == f"hub:org/tiny@{second}"


@pytest.mark.slow
def test_a_sweep_mixes_repositories_and_named_models(tmp_path, hub, run, saved):
    commits = {f"org/seed{seed}": hub.push(f"org/seed{seed}", saved(seed)) for seed in (0, 1)}
    status, plan, stderr = run("-m", "--dry-run", "model=org/seed0,tiny-dense,org/seed1", *SHORT)
    assert status == 0, stderr
    assert plan["points"] == 3
    assert "model.safetensors" not in hub.fetched
    assert len({row["estimated_model_bytes"] for row in plan["plan"]}) == 1  # three models of one shape, all known
    status, sweep, stderr = run("-m", "model=org/seed0,tiny-dense,org/seed1", *SHORT)
    assert status == 0, stderr
    assert [r["model"] for r in sweep["results"]] == ["org/seed0", "tiny-dense", "org/seed1"]
    fingerprints = [recorded(tmp_path, r["run_id"])["model"]["fingerprint"] for r in sweep["results"]]
    pins = [a for r in sweep["results"] for a in recorded(tmp_path, r["run_id"])["command"] if "revision" in a]
    assert pins == [f"model.revision={commit}" for commit in commits.values()]  # a branch may move in between
    assert fingerprints[::2] == [f"hub:{name}@{commit}" for name, commit in commits.items()]


@pytest.fixture
def online(monkeypatch, hub, tmp_path):
    """This process asks the stand-in, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    commit.cache_clear()
    yield hub
    commit.cache_clear()


def test_a_model_is_read_from_its_commit_and_not_from_a_folder_of_its_name(online, saved, tmp_path, monkeypatch, tiny):
    first = online.push("org/tiny", saved(0))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved(7), tmp_path / "org/tiny")
    config = Hub(name="hub", id="org/tiny")
    assert config.fingerprint() == f"hub:org/tiny@{first}"
    assert set(online.fetched) <= {"config.json"}  # to know the commit takes no weights
    loaded = config.load(torch.float32, torch.device("cpu"), tmp_path)
    assert torch.equal(loaded.model.model.embed_tokens.weight, tiny[0].model.embed_tokens.weight)
    assert loaded.fingerprint == f"hub:org/tiny@{first}"
    assert set(online.fetched) == NEEDED
    assert config.pinned() == replace(config, name="org/tiny", revision=first)

    second = online.push("org/tiny", saved(1))
    commit.cache_clear()  # another process
    assert config.fingerprint() == f"hub:org/tiny@{second}"
    assert replace(config, revision=first).fingerprint() == f"hub:org/tiny@{first}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit.cache_clear()
    assert config.fingerprint() == f"hub:org/tiny@{second}"  # as the cache knows it


def test_a_commit_is_the_fingerprint_so_no_file_is_hashed(online, qbench, saved, monkeypatch, tmp_path):
    def hashed(path):
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr("qbench.checkpoint.manifest.file_sha256", hashed)
    found = online.push("org/tiny", saved(0))
    outcome = qbench("model=org/tiny", "quantizer=rtn", *SHORT)
    assert outcome.status == 0, outcome.stderr
    assert outcome.summary["fingerprint"] == f"hub:org/tiny@{found}"
    stream = Hub(id="org/tiny", revision=found).stream(torch.float32, torch.device("cpu"), tmp_path)
    assert (len(stream), stream.name) == (2, "org/tiny")


def test_shards_that_the_index_names_are_fetched_and_no_others(online, saved, tmp_path):
    folder = saved(0)
    (folder / "model.safetensors").unlink()
    build("dense", 0)[0].save_pretrained(folder, max_shard_size="200KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    online.push("org/tiny", folder)
    Hub(name="hub", id="org/tiny").load(torch.float32, torch.device("cpu"), tmp_path)
    assert {name for name in online.fetched if name.endswith(".safetensors")} == shards


def test_code_is_fetched_only_for_who_trusts_it(online, saved, tmp_path):
    online.push("org/tiny", saved(0))
    config = Hub(name="hub", id="org/tiny")
    config.tokenizer(tmp_path)
    assert "modeling_x.py" not in online.fetched
    replace(config, trust_remote_code=True).tokenizer(tmp_path)
    assert "modeling_x.py" in online.fetched


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "org/tiny is quantized already (gptq 4 bit)"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "modeling_x.X"}}, "model.trust_remote_code=true"),
    ],
    ids=["quantized", "code of its own"],
)
def test_what_cannot_be_measured_is_refused_by_its_config_alone(online, qbench, saved, config, sentence):
    folder = saved(0)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    found = online.push("org/tiny", folder)
    branch, pinned_to = ("model=org/tiny", *SHORT), ("model=org/tiny", f"model.revision={found}", *SHORT)
    for arguments in (branch, pinned_to, ("--dry-run", *branch), ("--dry-run", *pinned_to)):
        outcome = qbench(*arguments)
        assert (outcome.status, outcome.stderr.count("qbench: ")) == (2, 1), outcome.stderr
        assert sentence in outcome.stderr
    assert set(online.fetched) == {"config.json"}


def test_what_is_not_there_is_said(online, qbench, saved):
    online.push("org/tiny", saved(0))
    nothing = "cannot get org/nothing from the Hugging Face Hub: there is no such repository"
    outcome = qbench("model=org/nothing", *SHORT)
    assert (outcome.status, outcome.summary["key"]) == (2, "model")
    assert nothing in outcome.stderr
    assert "it has no revision v9" in refused(qbench("model=org/tiny", "model.revision=v9", *SHORT), "model.revision")


def test_of_a_file_on_the_hub_the_setting_is_named_that_is_to_blame(online, qbench, saved, tmp_path, monkeypatch):
    online.push("org/tiny", saved(0))
    folder = tmp_path / "ggufs"
    folder.mkdir()
    for name in ("a-Q4_K.gguf", "b-Q8_0.gguf", "README.md"):
        (folder / name).write_bytes(b"GGUF")
    online.push("org/ggufs", folder)
    given = ("model=tiny-dense", "quantizer=file", *SHORT[1:])

    def asked(*settings):
        return qbench(*given, *settings)

    assert "there is no such repository" in refused(asked("quantizer.id=org/nothing"), "quantizer.id")
    no_revision = asked("quantizer.id=org/tiny", "quantizer.revision=v9")
    assert "it has no revision v9" in refused(no_revision, "quantizer.revision")
    no_file = asked("quantizer.id=org/ggufs", "quantizer.file=c.gguf")
    refused(no_file, "quantizer.file", ["org/ggufs has no file c.gguf: a-Q4_K.gguf, b-Q8_0.gguf"])
    no_weights = asked("quantizer.path=hub:org/ggufs")
    refused(no_weights, "quantizer.file", ["holds no safetensors", ": a-Q4_K.gguf, b-Q8_0.gguf"])
    unquantized = asked("quantizer.id=org/tiny")
    refused(unquantized, "quantizer.id", ["is in no format that is known here"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit.cache_clear()
    refused(asked("quantizer.id=org/other"), "quantizer.id", ["without network name what is here: quantizer.path="])
