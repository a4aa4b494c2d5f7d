"""Where passes run: side by side on this host, as jobs of Slurm, as tasks of Ray."""

import json
import os
import signal
import sys
import time
from importlib.util import find_spec

import pytest

from qbench.sweep.share import cores
from tests.conftest import refused
from tests.kill_sweep import all_passes, passes_of
from tests.sweep.test_sweep import TINY, _read, run


@pytest.mark.slow
def test_launchers_are_checked_before_anything_runs(qbench, monkeypatch):
    slurm = qbench("-m", *TINY, "hydra/launcher=slurm", "quantizer=rtn,sinq")
    assert "with this launcher say cuda or cpu" in refused(slurm)
    sweep = ("-m", *TINY, "quantizer=rtn,sinq", "runtime.device=cpu")
    missing = qbench(*sweep, "hydra.launcher._target_=hydra_plugins.none.None")
    assert "hydra_plugins.none.None cannot be imported" in refused(missing, "hydra/launcher")
    other = qbench(*sweep, "hydra.launcher._target_=hydra.plugins.launcher.Launcher")
    refused(other, "hydra/launcher", ["local", "slurm", "ray"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    if find_spec("submitit"):
        assert "there is no sbatch here" in refused(qbench(*sweep, "hydra/launcher=slurm"), "hydra/launcher")
    if find_spec("ray"):
        away = qbench(*sweep, "hydra/launcher=ray", "hydra.launcher.address=localhost:1")
        assert "no Ray answers there" in refused(away, "hydra.launcher.address=localhost:1")
    for extra, module in (("slurm", "submitit"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, module, None)
        refused(qbench(*sweep, f"hydra/launcher={extra}"), names=[f"pip install 'qbench-llm[{extra}]'"])
    refused(qbench(*sweep, "hydra/launcher=local", "hydra.launcher.n_job=2"), "hydra.launcher.n_job")


@pytest.mark.slow
def test_side_by_side(tmp_path):
    two = ("hydra/launcher=local", "hydra.launcher.n_jobs=2")
    sweep = ("-m", *TINY, *two, "quantizer=rtn", "quantizer.nbits=2,3")
    process = run(*sweep, folder=tmp_path)
    while len(running := passes_of(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    running[0].kill()
    stdout, stderr = process.communicate()
    assert process.returncode == 1, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert (summary["ok"], summary["failed"]) == (1, 1)
    assert "killed by SIGKILL" in stderr
    again = run(*sweep, folder=tmp_path)
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["skipped"] == 1
    threads = {r.environment["threads"] for r in map(_read, tmp_path.glob("outputs/results/*/result.json"))}
    assert threads == {int(os.environ.get("OMP_NUM_THREADS", max(1, cores() // 2)))}


@pytest.mark.slow
def test_an_interrupt_ends_all_that_run_side_by_side(tmp_path):
    two = ("hydra/launcher=local", "hydra.launcher.n_jobs=2")
    process = run("-m", *TINY, *two, "quantizer=rtn,sinq,nf4,hqq", folder=tmp_path)
    while len(running := passes_of(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert not any(p.is_running() and p.status() != "zombie" for p in running)
    assert not list(tmp_path.glob("outputs/locks/*"))
    assert all(_read(p).status == "ok" for p in tmp_path.glob("outputs/results/*/result.json"))


SBATCH = """#!{python}
import os, re, shutil, subprocess, sys
file = sys.argv[1]
shutil.copy(file, "{folder}/submitted")
last = int(re.search(r"--array=0-([0-9]+)", open(file).read()).group(1))
for i in range(last + 1):
    task = dict(SLURM_JOB_ID=str(100 + i), SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(i), SLURM_CPUS_PER_TASK="1")
    node = dict(SLURM_JOB_NUM_NODES="1", SLURM_NTASKS="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0")
    null = subprocess.DEVNULL
    subprocess.Popen(["bash", file], env=os.environ | task | node, stdin=null, stdout=null, stderr=null)
print("Submitted batch job 77")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
[[ -e {folder}/lost ]] && echo '77_0|FAILED|here' || echo '77_0|RUNNING|here'
for i in 1 2; do echo "77_$i|RUNNING|here"; done
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's own commands; submitit, its job files and the jobs are real."""
    pytest.importorskip("submitit", reason="pip install 'qbench-llm[slurm]'")
    commands = {"sbatch": SBATCH.format(python=sys.executable, folder=tmp_path), "srun": SRUN}
    commands["sacct"] = SACCT.format(folder=tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in commands.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = [f"hydra.launcher.{o}" for o in ("gpus_per_node=0", "partition=night", "mem_gb=5", "array_parallelism=2")]
    return "hydra/launcher=slurm", "runtime.device=cpu", *job


@pytest.mark.slow
def test_slurm(tmp_path, slurm):
    sweep = ("-m", *TINY, "quantizer=rtn", "quantizer.nbits=2,3,4", "hydra.launcher.n_jobs=2", *slurm)
    process = run(*sweep, folder=tmp_path)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["ok"] == 3
    assert "3 to run in 2 passes, as a job array of 2" in stderr
    for point in (1, 2, 3):
        assert stderr.count(f"[{point}/3] ") == 1
    submitted = (tmp_path / "submitted").read_text()
    for line in ("--array=0-1%2", "--partition=night", "--mem=5GB", "--cpus-per-task=8", "--job-name=qbench"):
        assert f"#SBATCH {line}" in submitted
    results = [_read(p) for p in tmp_path.glob("outputs/results/*/result.json")]
    assert [r.environment["threads"] for r in results] == [1, 1, 1]


@pytest.mark.slow
def test_a_lost_job_does_not_end_the_others(tmp_path, slurm):
    process = run("-m", *TINY, "quantizer=rtn", "task.window=256,512", *slurm, folder=tmp_path)
    ours = []
    while not ours:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
        ours = [p for p in all_passes() if p.cwd() == str(tmp_path) and "/1-" in p.cmdline()[-1]]
    job = ours[0].parent()
    assert any("submitit" in word for word in job.cmdline())
    ours[0].suspend()  # so that it cannot finish first
    job.kill()
    ours[0].kill()
    (tmp_path / "lost").touch()
    stdout, stderr = process.communicate()
    assert process.returncode == 1, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert (summary["ok"], summary["failed"]) == (1, 1)
    assert "job 77_0 was lost: " in stderr


@pytest.mark.slow
def test_ray(tmp_path):
    """A Ray of this host, started for the sweep: a task a pass, over which the points are dealt out."""
    pytest.importorskip("ray", reason="pip install 'qbench-llm[ray]'")
    two = ("hydra/launcher=ray", "hydra.launcher.n_jobs=2", "hydra.launcher.num_cpus=1")
    sweep = ("-m", *TINY, *two, "quantizer=rtn", "quantizer.nbits=2,3,4")
    process = run(*sweep, folder=tmp_path)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["ok"] == 3
    assert "3 to run in 2 passes, as 2 tasks of Ray" in stderr
    for point in (1, 2, 3):
        assert stderr.count(f"[{point}/3] ") == 1
    assert len(list(tmp_path.glob("outputs/results/*/result.json"))) == 3
    gpu = run(*sweep, "hydra.launcher.num_gpus=1", "runtime.rerun=true", folder=tmp_path)
    stdout, stderr = gpu.communicate()
    if "has 0 GPUs" in stderr:  # a machine without
        assert gpu.returncode == 2
        assert "set hydra.launcher.num_gpus" in json.loads(stdout.splitlines()[-1])["error"]


@pytest.mark.slow
def test_an_interrupt_of_ray_ends_its_tasks(tmp_path):
    pytest.importorskip("ray", reason="pip install 'qbench-llm[ray]'")
    launcher = ("hydra/launcher=ray", "hydra.launcher.num_cpus=1")
    process = run("-m", *TINY, *launcher, "quantizer=rtn,sinq,gptq,awq", folder=tmp_path)
    while not (ours := [p for p in all_passes() if p.cwd() == str(tmp_path)]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert not any(p.is_running() and p.status() != "zombie" for p in ours)
    assert not list(tmp_path.glob("outputs/locks/*"))
    assert all(_read(p).status == "ok" for p in tmp_path.glob("outputs/results/*/result.json"))
