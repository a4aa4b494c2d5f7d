"""Kills a real sweep at random moments and checks what it leaves: python -m tests.kill_sweep [--kills 30] [--seed 0]

Each kill is a SIGKILL, at a moment drawn evenly from the lifetime of a pass, of the pass's process, of the sweep's, or
of both. A sweep has two passes of four points, so that a kill may fall between two points that are recorded, and a
pass whose process died is tried again in halves. After every kill, and once more at the end:

- a finished point is byte for byte what it was;
- every file of results and baselines can be read in full, files named .partial-* aside, which nothing reads;
- when no process is left, every lock is free.

The sweep is started again whenever it has ended, with the same command, until it ends with status 0: then every
point is finished, the killed ones included, and no lock file and no failure is left. Only a pass of one is recorded as
killed: of a larger one, what was not recorded is tried again at once.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock
from safetensors.numpy import load_file

from qbench.record.result import Result
from qbench.record.store import PARTIAL

POINTS = ("quantizer=rtn,sinq", "quantizer.nbits=3,4", "task.window=256,512")
TARGETS = ("pass", "pass", "pass", "sweep", "both")


@dataclass
class Attack:
    folder: Path
    options: tuple[str, ...] = ()
    finished: dict[Path, bytes] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # run_ids that were recorded as killed
    lifetime: float = 10.0  # seconds of a pass's process, renewed with each that ends by itself
    generation: int = 0  # of points: another seed of the model makes other points

    def run(self, kills: int, chance: random.Random) -> dict[str, int]:
        count = dict.fromkeys(("pass", "sweep", "both"), 0)
        sweep: subprocess.Popen | None = None
        while sum(count.values()) < kills:
            if sweep is None or sweep.poll() is not None:
                if sweep is not None and sweep.returncode == 0:
                    self.generation += 1  # all finished: go on with new points
                sweep = self.start()
            victim = self.next_pass(sweep)
            if victim is None:
                continue
            time.sleep(chance.uniform(0, self.lifetime))
            target = chance.choice(TARGETS)
            if target == "pass" and not victim.is_running():
                continue  # finished before its moment came
            if target != "pass":
                sweep.kill()
            if target != "sweep":
                kill(victim)
            count[target] += 1
            if target == "pass":
                time.sleep(0.5)  # the sweep records the death
            else:
                sweep.wait()
            self.check()
            if target == "both":
                self.check_locks()
        if sweep is not None:
            sweep.wait()
        for generation in range(self.generation + 1):
            self.generation = generation
            for _ in range(2):  # an orphan of a killed sweep may still hold its point in the first round
                status = self.start().wait()
                if status == 0:
                    break
            assert status == 0, "the sweep did not end well after the last kill"
        self.check()
        self.check_locks()
        results = [Result.from_json(path.read_bytes()) for path in self.results()]
        assert len(results) == 8 * (self.generation + 1), f"{len(results)} points"
        assert all(r.status == "ok" for r in results)
        assert self.lost <= {r.run_id for r in results}, "a killed point was not tried again"
        assert not list(self.folder.glob("outputs/locks/*")), "a lock file is left"
        return count

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "qbench", "-m", "model=tiny-dense", "task.max_windows=4", *POINTS]
        log = (self.folder / "log.txt").open("ab")
        seed = f"model.seed={self.generation}"
        return subprocess.Popen([*command, seed, *self.options], cwd=self.folder, stdout=log, stderr=log)

    def next_pass(self, sweep: subprocess.Popen) -> psutil.Process | None:
        """A pass's process that has just started; None when the sweep ends without one."""
        old = {p.pid for p in passes_of(sweep.pid)}
        while sweep.poll() is None:
            for process in passes_of(sweep.pid):
                if process.pid not in old or time.time() - process.create_time() < 1:
                    return process
            time.sleep(0.02)
        return None

    def results(self) -> list[Path]:
        return sorted(self.folder.glob("outputs/results/*/result.json"))

    def check(self) -> None:
        for path in self.results():
            content = path.read_bytes()
            result = Result.from_json(content, str(path))
            if result.status == "failed":
                assert "SIGKILL" in (result.error or ""), result.error
                self.lost.add(result.run_id)
                continue
            assert self.finished.setdefault(path, content) == content, f"{path} was changed"
            for name in result.files():
                assert load_file(path.parent / name)
        if ended := re.findall(
            r"^pass .*: ended after ([\d.]+) s$", (self.folder / "log.txt").read_text(), re.MULTILINE
        ):
            self.lifetime = float(ended[-1])
        for path in self.folder.glob("outputs/baselines/*"):
            assert path.name.startswith(PARTIAL) or load_file(path)

    def check_locks(self) -> None:
        """Waits for orphans first, which rightly hold theirs."""
        while any(process.cwd() == str(self.folder) for process in all_passes()):
            time.sleep(0.2)
        for path in self.folder.glob("outputs/locks/*"):
            with FileLock(path, timeout=0):
                pass


def passes_of(pid: int) -> list[psutil.Process]:
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if is_pass(p)]
    except psutil.NoSuchProcess:
        return []


def all_passes() -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if is_pass(p)]


def is_pass(process: psutil.Process) -> bool:
    try:
        return "--pass" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(10)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="more overrides, such as hydra/launcher=local")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder).resolve(), tuple(arguments.options))
        started = time.perf_counter()
        count = attack.run(arguments.kills, random.Random(arguments.seed))
        report = {"kills": count, "points": len(attack.finished), "recorded_as_killed": len(attack.lost)}
        print(json.dumps(report | {"seconds": round(time.perf_counter() - started)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
