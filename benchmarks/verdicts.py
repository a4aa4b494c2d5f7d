"""Do verdicts hold? Comparisons of a method with itself, and of differences of the size that is said to be detectable.

    python benchmarks/verdicts.py [OUTPUTS [MODEL ...]] > docs/results/verdicts.json

Measures the points of SWEEPS (of the models alone that are named), unless OUTPUTS holds them, and takes what they
scored per window and draw as pools: another text of the same kind is other windows of the pool, another calibration or
seed other draws of it, both with replacement. Every comparison then runs through what a board runs through
(report/noise.py). Of RUNS comparisons of a method with itself 5 % should say "different", of boards of six equal rows
at most 5 % any two, and of comparisons with a true difference as large as an independent board prints as detectable,
80 % should find it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qbench.report import entries
from qbench.report.noise import Paired, Told

RUNS, LONG, ROWS = 400, 2000, 6
SIZES = [(24, 4), (48, 6), (166, 6)]  # windows, draws; 166 windows of 2048 are all of WikiText-2's test
RATIOS = (0, 1, 2, 4)  # of simulated draws: the variance of a draw's number that is the draw's over the rest of it
SKEWED = 1.0  # of simulated windows, sigma of the lognormal that their differences have
DOCUMENTS = [(200, 0.1), (1000, 0.05)]  # and the share of them that turn right or wrong
SWEEPS = [
    "model=tiny-dense quantizer=none,noise,rtn,sinq,gptq,awq task.window=256 task.max_windows=48 calibration.draws=24 "
    "calibration.window=256 calibration.sequences=8",
    "model=smollm2-135m quantizer=none,noise,rtn,sinq task.window=32 task.max_windows=16 calibration.draws=4 "
    "calibration.window=128 calibration.sequences=2",
]
Sample = Callable[[np.random.Generator], tuple[np.ndarray, list[np.ndarray | None]]]


@dataclass(frozen=True)
class Pool:
    """NLLs of one method, `[windows, draws]`."""

    name: str
    table: np.ndarray

    def of_draws(self, rows: int, windows: int, draws: int) -> Sample:
        """Rows of the method itself, each with draws of its own, all on one choice of windows."""

        def sample(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray | None]]:
            chosen = self.table[random.integers(0, len(self.table), windows)]
            tables = [chosen[:, random.integers(0, self.table.shape[1], draws)] for _ in range(rows)]
            return np.stack([table.mean(1) for table in tables]), [*tables]

        return sample

    def of_windows(self, other: Pool, rows: int, windows: int) -> Sample:
        """The first row is the method, the others differ from it as `other` does, window by window, on average by 0."""

        def sample(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray | None]]:
            apart = (other.table - self.table).mean(1)
            own = self.table.mean(1)[random.integers(0, len(self.table), windows)]
            rest = (apart - apart.mean())[random.integers(0, len(apart), (rows - 1, windows))]
            return np.stack([own, *(own + rest)]), [None] * rows

        return sample


def simulated(rows: int, windows: int, skewed: bool) -> Sample:
    """Windows that no model scored: differences that are normal, or lognormal as of a text with a few hard windows."""

    def sample(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray | None]]:
        own, rest = 3 + 0.3 * random.standard_normal(windows), random.standard_normal((rows - 1, windows))
        rest = np.exp(SKEWED * rest) - np.exp(SKEWED**2 / 2) if skewed else rest
        return np.stack([own, *(own + 0.02 * rest)]), [None] * rows

    return sample


def documents(rows: int, count: int, changed: float) -> Sample:
    """Answers of which one in 1 / `changed` turns, as often right as wrong."""

    def sample(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray | None]]:
        first = random.random(count) < 0.5
        turned = random.random((rows - 1, count)) < changed
        return np.stack([first, *(first ^ turned)]).astype(float), [None] * rows

    return sample


def drawn(rows: int, windows: int, draws: int, ratio: float) -> Sample:
    """Rows of one mean: a draw's number varies `ratio` times as much with the draw as with what its windows add."""

    def sample(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray | None]]:
        own, effect = 3 + random.normal(0, 0.3, (windows, 1)), 0.02 * np.sqrt(ratio / windows)
        size = (windows, draws)
        tables = [own + random.normal(0, effect, draws) + random.normal(0, 0.02, size) for _ in range(rows)]
        return np.stack([table.mean(1) for table in tables]), [*tables]

    return sample


def told(scores: np.ndarray, draws: list[np.ndarray | None], reading: Any) -> Told:
    return Told.of(Paired(scores, reading, draws=draws))


def any_apart(found: Told) -> bool:
    return bool((found.adjusted < 0.05).any())


def alike(
    sample: Sample, board: Sample, reading: Any, random: np.random.Generator, runs: int = RUNS
) -> dict[str, float]:
    pairs = [any_apart(told(*sample(random), reading)) for _ in range(runs)]
    boards = [any_apart(told(*board(random), reading)) for _ in range(runs)]
    return {"different": float(np.mean(pairs)), "boards_with_any": float(np.mean(boards))}


def ignoring_draws(sample: Sample, random: np.random.Generator) -> float:
    """What the same comparisons say if draws are not part of the interval."""
    made = (sample(random) for _ in range(RUNS))
    return float(np.mean([any_apart(told(scores, [None] * len(scores), "exp mean")) for scores, _ in made]))


def found(sample: Sample, random: np.random.Generator) -> float:
    """The share of true differences found that are as large as another sample says is detectable; of perplexities."""
    hits = 0
    for _ in range(RUNS):
        printed = told(*sample(random), "exp mean").detectable(0, 1)
        scores, draws = sample(random)
        shift = np.log1p(printed / np.exp(scores[0].mean()))
        draws = [table if i != 1 or table is None else table + shift for i, table in enumerate(draws)]
        scores[1] += shift
        hits += told(scores, draws, "exp mean").apart(0, 1)
    return hits / RUNS


def found_documents(count: int, changed: float, random: np.random.Generator) -> float:
    hits = 0
    for _ in range(RUNS):
        printed = told(*documents(2, count, changed)(random), "mean").detectable(0, 1)
        first, gains = random.random(count) < 0.5, 0.5 * (1 + printed / changed)
        turned = random.random(count) < changed
        second = np.where(turned, random.random(count) < gains, first)
        first = np.where(turned, ~second, first)
        hits += told(np.stack([first, second]).astype(float), [None, None], "mean").apart(0, 1)
    return hits / RUNS


def again(pools: dict[str, Pool], random: np.random.Generator) -> dict[str, Any]:
    """A board of all methods, and the whole again on other windows with other draws: do the ranks come out again?"""
    apart = agreed = reversed_ = boards = 0
    names = sorted(set(pools) - {"noise"})
    for _ in range(RUNS):
        windows = np.array_split(random.permutation(len(pools[names[0]].table)), 2)
        both, draws = [], {name: random.permutation(pools[name].table.shape[1]) for name in names}
        for half, at in enumerate(windows):
            tables = [pools[name].table[at][:, np.array_split(draws[name], 2)[half][:6]] for name in names]
            tables = [t if t.size else pools[n].table[at] for t, n in zip(tables, names, strict=True)]  # of one draw
            scores = np.stack([table.mean(1) for table in tables])
            board = told(scores, [table if table.shape[1] > 1 else None for table in tables], "exp mean")
            order = np.sign(board.paired.values[:, None] - board.paired.values)
            both.append(np.where(board.adjusted < 0.05, order, 0.0))
        upper = np.triu_indices(len(names), 1)
        first, second = both[0][upper], both[1][upper]
        apart += int((first != 0).sum())
        agreed += int((first * second > 0).sum())
        reversed_ += int((first * second < 0).sum())
        boards += bool((first * second < 0).any())
    found = {"pairs_apart": apart, "apart_again": agreed, "reversed": reversed_, "boards_with_any_reversed": boards}
    return {"kind": "other half of the text and other draws", "rows": names, "boards": RUNS, **found}


def comparisons(pools: dict[str, dict[str, Pool]]) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(18)
    for model, methods in pools.items():
        yield {"model": model} | again(methods, random)
        for windows, draws in SIZES:
            for name in ("gptq", "awq", "noise"):
                if name not in methods:
                    continue
                two, six = (methods[name].of_draws(rows, windows, draws) for rows in (2, ROWS))
                kind = "other noise seeds" if name == "noise" else "other calibration draws"
                yield {
                    **{"kind": kind, "model": model, "method": name, "windows": windows, "draws": draws},
                    **alike(two, six, "exp mean", random),
                    "different_if_draws_are_ignored": ignoring_draws(two, random),
                    "detectable_found": found(two, random),
                }
            one, other = methods["sinq"], methods["rtn"]
            two, six = (one.of_windows(other, rows, windows) for rows in (2, ROWS))
            yield {
                **{"kind": "other windows of the same text", "model": model, "method": "sinq", "windows": windows},
                **{"draws": 1, "differing_as": "rtn"},
                **alike(two, six, "exp mean", random),
                "detectable_found": found(two, random),
            }
    for windows, _ in SIZES:
        for skewed in (False, True):
            two, six = (simulated(rows, windows, skewed) for rows in (2, ROWS))
            yield {
                **{"kind": "simulated windows", "differences": "lognormal" if skewed else "normal", "windows": windows},
                **alike(two, six, "exp mean", random),
                "detectable_found": found(two, random),
            }
    for count, changed in DOCUMENTS:
        two, six = (documents(rows, count, changed) for rows in (2, ROWS))
        yield {
            **{"kind": "right and wrong answers (simulated)", "documents": count, "changed": changed},
            **alike(two, six, "mean", random),
            "detectable_found": found_documents(count, changed, random),
        }


def seeds_that_do_nothing() -> Iterator[dict[str, Any]]:
    """Pools of few and of many seeds that change no window on average: what a small pool does by itself."""
    random = np.random.default_rng(19)
    for count in (4, 24, 100):
        pools = [
            Pool("", 3 + random.normal(0, 0.3, (48, 1)) + random.normal(0, 1e-6, (48, count))) for _ in range(RUNS)
        ]
        for windows, draws in SIZES[:2]:
            apart = [any_apart(told(*pool.of_draws(2, windows, draws)(random), "exp mean")) for pool in pools]
            kind = {"kind": "noise seeds (simulated)", "seeds_of_a_pool": count, "windows": windows, "draws": draws}
            yield kind | {"different": float(np.mean(apart))}


def draws_that_matter_little() -> Iterator[dict[str, Any]]:
    """Long runs, since a board of equal rows errs most where a test overlooks some of what draws add."""
    random = np.random.default_rng(20)
    for windows, draws in SIZES:
        for ratio in RATIOS:
            two, six = (drawn(rows, windows, draws, ratio) for rows in (2, ROWS))
            kind = {"kind": "calibration draws (simulated)", "runs": LONG, "ratio": ratio, "windows": windows}
            yield kind | {"draws": draws} | alike(two, six, "exp mean", random, LONG)


def recorded(outputs: Path, sweeps: list[str]) -> dict[str, dict[str, Pool]]:
    """What the sweeps measured, by model and method; runs them where they have not been."""
    for sweep in sweeps:
        command = [sys.executable, "-m", "qbench", "-m", *sweep.split(), f"outputs={outputs}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pools: dict[str, dict[str, Pool]] = {}
    for entry in entries.latest(entries.read(outputs).entries):
        [score] = entry.scores
        table = score.windows[:, None] if score.draws is None else score.draws
        pools.setdefault(entry.model, {})[entry.quantizer] = Pool(entry.quantizer, table)
    return pools


def main() -> None:
    outputs, *models = sys.argv[1:] or ["outputs"]
    sweeps = [sweep for sweep in SWEEPS if not models or sweep.split()[0].removeprefix("model=") in models]
    pools = recorded(Path(outputs), sweeps)
    made = []
    for comparison in chain(comparisons(pools), seeds_that_do_nothing(), draws_that_matter_little()):
        print(json.dumps(comparison), file=sys.stderr)
        made.append({k: round(v, 4) if isinstance(v, float) else v for k, v in comparison.items()})
    spread = {
        model: {name: [float(f"{v:.4g}") for v in np.exp(pool.table.mean(0))] for name, pool in methods.items()}
        for model, methods in pools.items()
    }
    document = {"runs": RUNS, "rows_of_a_board": ROWS, "sweeps": sweeps, "comparisons": made, "perplexities": spread}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
