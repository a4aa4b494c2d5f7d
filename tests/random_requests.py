"""Random command lines: whatever is asked for, an answer and never a traceback.

    python -m tests.random_requests --seed 0 --count 1000

Each request is random overrides of the schema's keys, with right and wrong values, of groups, with `+`, `++`, `~` and
sweeps. It must end with exit status 0, 1 or 2, without a traceback, and for 2 with one sentence: one line, or for a
sweep the list of its points that docs/sweeps.md describes. Failing command lines are printed, counts as JSON last.
qbench is imported once; every request runs in a fork of this process, in an empty folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from qbench.config import Config
from qbench.registry import KINDS, find, names
from qbench.request.options import GROUPS, options

SECONDS = 60  # one request may take
RUNS = 0.1  # of the requests are really run, on the tiny model; the others are planned
TEXTS = ("", " ", "a", "nowhere.txt", "nowhere/deep", "here.txt", ".", "/", "/dev/null", "~", "null", "None", "x" * 300)
ODD = (
    "näher", "漢字", "\u202eabc", "\u2028", "a\tb", "a\nb", "\udc80", "\ud800x", "é" * 200, "\ufeff",
    "🙂", "%s", "\\",
)  # fmt: skip
SYNTAX = (
    "a=b", "a,b", "a b", "(", ")", "[", "]", "{", "}", "'", '"', "#x", "$x", "${x}",
    "${model.name}", "${oc.env:HOME}", "${now:%Y}", "[1,2]", "[[[1]]]", "{a: 1}", "{}", "[]", "'q'",
    '"q"', "a(copy)", "!x", "&x", "*", "@x", "a:b", "!!int",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "4", "8", "64", "-1", "-2", "0.5", "4.0", "1e3", "1e400", "-1e400", "nan",
    "inf", "-inf", "99999999999999999999999", "-99999999999999999999999", "2147483648",
    "9223372036854775808", "0x10", "1_000", "true", "false",
)  # fmt: skip
SWEEPS = (
    "choice({a})", "choice({a},{b})", "{a},{b}", "{a},", ",{a}", "range(1,4)", "range(4,1)",
    "range(0,1,0)", "range(0,1e9)", "range(nan,1)", "interval(0,1)", "glob(*)", "glob(a*)",
    "glob(zzz*)", "glob([a*,r*],exclude=awq)", "sort({a},{b})", "shuffle({a},{b})",
    "tag(t,choice({a},{b}))", "int({a})", "float({a})", "str({a})", "bool({a})", "json_str({a})",
    "nothing({a})", "choice()", "sort(range(1,4))", "extend_list({a})",
)  # fmt: skip
LINES = (
    "a b", "=", "=1", "model", "+", "++", "~", "~model", "model=", "1=2", ".=1", "task.=1",
    "task..x=1", "@=1", "--flag", "-x", "model@x=rtn", "task={window: 64}", "task=1",
    "quantizer=[rtn,awq]", "hydra.mode=no", "hydra.run=1", "hydra/launcher=no",
    "hydra.sweeper.also=1", "hydra.sweeper.params=[1]", "hydra.launcher.x=1", "+experiment=demo",
    "experiment=null", "runtime.device=cuda:99", "runtime.device=cuda:-1", "runtime.device=cuda:x",
)  # fmt: skip


def keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, and for a node that a kind of extension fills, every field of every member of it."""
    defaults, extended = kind(), {each.node: each for each in KINDS}
    for field in fields(kind):
        value = getattr(defaults, field.name)
        if is_dataclass(value):
            yield from keys(type(value), f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            extension = extended[field.name]
            found = {f.name for name in names(extension) for f in fields(find(extension, name))}
            yield from (f"{field.name}.{name}" for name in sorted(found | {extension.key}))
        else:
            yield f"{prefix}{field.name}"


@dataclass(frozen=True)
class Grammar:
    keys: tuple[str, ...]
    options: dict[str, tuple[str, ...]]

    @classmethod
    def of_this_installation(cls) -> Grammar:
        return cls(tuple(keys()), {group: tuple(options(group)) for group in GROUPS})

    def request(self, draw: random.Random) -> list[str]:
        """One command line, without `python -m qbench`."""
        running = draw.random() < RUNS
        asked = ["model=tiny-dense"] + (["task.window=64", "task.max_windows=1"] if running else [])
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 5))):
            asked.append(self.override(draw, running))
        if running:
            return asked
        return [*(["-m"] if draw.random() < 0.4 else []), *asked, "--dry-run"]

    def override(self, draw: random.Random, running: bool) -> str:
        kind = draw.random()
        if kind < 0.08:
            return draw.choice(LINES)
        if kind < 0.3:
            group = draw.choice([g for g in GROUPS if not (running and g in ("model", "experiment"))])
            key, legal = group, self.options[group]
        else:
            key = draw.choice(self.keys)
            if draw.random() < 0.1:  # misspelt
                at = draw.randrange(len(key))
                key = key[:at] + draw.choice(("", "x", ".", "-", "é")) + key[at + 1 :]
            legal = NUMBERS
        prefix = draw.choice(("",) * 12 + ("+", "++", "~"))
        value = self.value(draw, legal)
        if not running and draw.random() < 0.15:
            value = draw.choice(SWEEPS).format(a=value, b=self.value(draw, legal))
        return f"{prefix}{key}={value}"

    def value(self, draw: random.Random, legal: tuple[str, ...]) -> str:
        if draw.random() < 0.5:
            return draw.choice(legal)
        value = draw.choice(draw.choice((TEXTS, ODD, SYNTAX, NUMBERS)))
        return json.dumps(value, ensure_ascii=False) if draw.random() < 0.25 else value


def answer(request: list[str], folder: Path) -> tuple[int | str, str]:
    """Exit status, or how else the process ended, and what it wrote to stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(request, folder, out.fileno(), err.fileno())
        deadline = time.monotonic() + SECONDS
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        err.seek(0)
        said = err.read().decode(errors="replace")
    if not done:
        return f"took more than {SECONDS} s", said
    return os.waitstatus_to_exitcode(status), said


def _become(request: list[str], folder: Path, out: int, err: int) -> None:
    """In the fork: the command itself; never returns."""
    status = 99
    try:
        from qbench import entry
        from qbench.__main__ import main

        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        sys.argv = ["qbench", *request]
        entry.leave(main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fault(status: int | str, said: str, running: bool) -> str | None:
    """What is wrong with an answer, or None."""
    if status not in (0, 1, 2):
        return f"ended with {status}"
    if "Traceback" in said or "unexpected " in said:
        return "a traceback, or an error that nobody foresaw"
    if status != 2:
        return None
    lines = [line for line in said.split("\n") if line.strip()]  # a name may hold U+2028
    own = [index for index, line in enumerate(lines) if line.startswith("qbench: ")]
    if len(own) != 1:
        return f"{len(own)} sentences for one wrong request"
    rest = lines[own[0] + 1 :] if running else lines[: own[0]] + lines[own[0] + 1 :]
    listed = lines[own[0]].endswith("cannot run, so none was started:")
    if rest and not (listed and all(line.startswith("  ") for line in rest)):
        return "more than one sentence for one wrong request"
    return None


def prepare_this_process() -> None:
    """Imports what a request imports, once, and nothing that starts a thread."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    import torch
    import transformers.models.qwen3

    torch.set_num_threads(1)
    del transformers


def check(seed: int, count: int, say: Any = print) -> Counter:
    """Counts of the answers; each failing command line is said as it is found."""
    prepare_this_process()
    grammar, draw, counts = Grammar.of_this_installation(), random.Random(seed), Counter()
    for number in range(count):
        request = grammar.request(draw)
        with tempfile.TemporaryDirectory(prefix="qbench-request-", ignore_cleanup_errors=True) as name:
            (Path(name) / "here.txt").write_text("a river, a stone and a baker\n" * 400)
            status, said = answer(request, Path(name))
        counts[f"exit {status}"] += 1
        if wrong := fault(status, said, "--dry-run" not in request):
            counts["faults"] += 1
            command = shlex.join(request).encode("utf-8", "backslashreplace").decode()
            say(f"{number}: {wrong}: python -m qbench {command}\n    {said.strip()[-1500:]!r}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    counts = check(asked.seed, asked.count)
    print(json.dumps({"seed": asked.seed, "requests": asked.count, "faults": 0} | dict(sorted(counts.items()))))
    return int(counts["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
