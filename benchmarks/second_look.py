"""A board, and the whole again on the other half of a text with other draws: are its ranks the same?

    python benchmarks/second_look.py --text WIKI_TEST_RAW OUTPUTS model=smollm2-135m task=wikitext2 > second.json
    python benchmarks/second_look.py --compare-only OUTPUTS/first OUTPUTS/second > second.json

Cuts the text in two halves at the end of a line. The first board is of the first half and the draws from 0 on, the
second of the second half and as many draws that follow. The words are the command's own, such as a model, a task that
reads `task.path`, runtime or calibration settings; `--sweep WORDS`, once or more, says which methods in place of eight
methods at 4 and 3 bits with the noise floor; all of a board are one pass, if its states fit. A pair is ranked apart as
a board ranks (report/noise.py). Exit status 1 if a pair that both boards rank apart is the other way round in the
second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from qbench.errors import RequestError
from qbench.report import board, columns, entries
from qbench.report.board import FLOOR, Section
from qbench.report.noise import Paired, Told

SWEEPS = ("quantizer=rtn,hqq,gptq,awq,sinq,asinq quantizer.nbits=4,3", "quantizer=nf4,fp4,noise")


@dataclass(frozen=True)
class Board:
    """The rows that a board ranks, by the settings of their method."""

    names: dict[str, str]  # of a row, by its settings, for people
    told: Told

    @staticmethod
    def of(section: Section, draw: int | None = None) -> Board:
        """`draw`: as the board would be if calibrated methods had been measured in this one of their draws alone."""
        rows = [row for row in section.rows if row.entry.quantizer != FLOOR and row.score.windows is not None]
        draws = [row.score.draws for row in rows]
        scores = [row.score.windows for row in rows]
        if draw is not None:
            scores = [own if table is None else table[:, draw] for own, table in zip(scores, draws, strict=True)]
            draws = [None] * len(rows)
        paired = Paired(np.stack(scores), section.number.reading, rows[0].score.weights, draws=draws)
        told = Told.of(paired, section.floor)
        return Board({json.dumps(row.entry.identity.quantizer, sort_keys=True): row.method for row in rows}, told)

    def order(self, settings: Sequence[str]) -> np.ndarray:
        """`[rows, rows]`: 1 where the first is told to be the larger, -1 the smaller, 0 where they are not apart."""
        at = [list(self.names).index(one) for one in settings]
        values = self.told.paired.values
        return np.array([[np.sign(values[i] - values[j]) * self.told.apart(i, j) for j in at] for i in at])


def halves(text: Path, folder: Path) -> list[Path]:
    """The text in two files, cut at the end of the line in its middle."""
    content = text.read_text(encoding="utf-8")
    middle = content.index("\n", len(content) // 2) + 1
    folder.mkdir(parents=True, exist_ok=True)
    found = [folder / f"{text.stem}-half-{n}.txt" for n in (1, 2)]
    for path, part in zip(found, (content[:middle], content[middle:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return found


def measure(outputs: Path, text: Path, words: Sequence[str], sweeps: Sequence[str], draws: range) -> None:
    """One board: the sweeps are one experiment, so they share a pass; what is recorded is not measured again."""
    products = [dict(word.split("=", 1) for word in sweep.split()) for sweep in sweeps]
    experiment = outputs / "conf" / "experiment" / "second_look.yaml"
    experiment.parent.mkdir(parents=True, exist_ok=True)
    sweeper = {"params": products[0], "also": products[1:]}
    experiment.write_text("# @package _global_\n" + json.dumps({"hydra": {"sweeper": sweeper}}), encoding="utf-8")
    drawn = [f"calibration.draws={len(draws)}", f"calibration.first_draw={draws.start}"]
    command = ["--config-dir", str(outputs / "conf"), "-m", "experiment=second_look", *words, *drawn]
    command += [f"task.path={text.resolve()}", f"outputs={outputs.resolve()}"]
    done = subprocess.run([sys.executable, "-m", "qbench", *command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # qbench has said why


def section_of(outputs: Path) -> Section:
    """The one board that lies there: of a perplexity, its only text."""
    try:
        recorded = entries.read(outputs).entries
    except RequestError as error:
        raise SystemExit(str(error)) from None
    found = board.sections(entries.latest(recorded), *columns.order("quality"))
    found = [section for section in found if section.number.name == "ppl"]
    if len(found) != 1:
        raise SystemExit(f"{outputs} holds {len(found)} boards of a perplexity; there must be one")
    return found[0]


def compared(first: Section, second: Section) -> dict[str, Any]:
    one, other = Board.of(first), Board.of(second)
    shared = [settings for settings in one.names if settings in other.names]
    upper = np.triu_indices(len(shared), 1)
    before, after = (each.order(shared)[upper] for each in (one, other))
    turned = [(shared[i], shared[j]) for i, j, k in zip(*upper, before * after, strict=True) if k < 0]

    def alone(section: Section) -> list[np.ndarray]:
        counts = [row.score.draws.shape[1] for row in section.rows if row.score.draws is not None]
        return [Board.of(section, draw).order(shared)[upper] for draw in range(min(counts, default=0))]

    of_draws = [
        bool((one_draw * other_draw < 0).any()) for one_draw, other_draw in product(alone(first), alone(second))
    ]
    return {
        "boards": [
            {
                "title": section.title,
                "windows": each.told.paired.windows,
                "floor": section.floor,
                "floor_kl": section.floor_kl,
                "rows": [
                    {"method": row.method, "rank": row.rank, "ppl": row.score.value, "draws": row.score.number.draws}
                    for row in section.rows
                ],
                "sentences": section.sentences,
            }
            for section, each in ((first, one), (second, other))
        ],
        "rows": len(shared),
        "pairs": len(before),
        "apart_in_first": int((before != 0).sum()),
        "apart_in_second": int((after != 0).sum()),
        "apart_again": int((before * after > 0).sum()),
        "reversed": [[one.names[i], one.names[j]] for i, j in turned],
        "with_a_single_draw": {"board_pairs": len(of_draws), "with_any_reversed": sum(of_draws)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file of text, cut in two")
    parser.add_argument("--draws", type=int, default=6, help="of each board")
    parser.add_argument("--sweep", action="append", help="methods in the command's words, in place of the eight")
    parser.add_argument("--compare-only", nargs=2, type=Path, metavar="DIR", help="two folders of results")
    parser.add_argument("outputs", type=Path, nargs="?", help="for the halves and both boards")
    parser.add_argument("words", nargs="*", help="of python -m qbench")
    asked = parser.parse_args()
    folders = asked.compare_only
    if folders is None:
        if asked.text is None or asked.outputs is None:
            parser.error("give --text FILE and an OUTPUTS folder, or --compare-only DIR DIR")
        folders = [asked.outputs / name for name in ("first", "second")]
        for n, half in enumerate(halves(asked.text, asked.outputs.resolve())):
            draws = range(n * asked.draws, (n + 1) * asked.draws)
            measure(folders[n], half, asked.words, asked.sweep or SWEEPS, draws)
    found = compared(*map(section_of, folders))
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["reversed"]))


if __name__ == "__main__":
    main()
