"""benchmarks/second_look.py: what one board tells apart must not be the other way round in another."""

import json
import subprocess
import sys

from benchmarks.second_look import compared, halves, section_of
from tests.conftest import ROOT
from tests.report.examples import nll, point, save
from tests.report.test_verdicts import drawn


def boards(tmp_path, second):
    first = [("sinq", 0.20), ("rtn", 0.30), ("hqq", 0.301)]
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, rows in zip(folders, (first, second), strict=True):
        save(folder, *(point(name, 4, nll(shift, seed)) for seed, (name, shift) in enumerate(rows)))
    return folders


def test_the_same_order_is_no_reversal(tmp_path):
    folders = boards(tmp_path, [("sinq", 0.22), ("rtn", 0.31), ("hqq", 0.305)])
    found = compared(*map(section_of, folders))
    assert (found["rows"], found["pairs"]) == (3, 3)
    assert (found["apart_in_first"], found["apart_again"], found["reversed"]) == (2, 2, [])


def test_an_order_that_turns_is_told(tmp_path):
    folders = boards(tmp_path, [("sinq", 0.40), ("rtn", 0.30), ("hqq", 0.305)])
    script = ROOT / "benchmarks" / "second_look.py"
    done = subprocess.run(
        [sys.executable, script, "--compare-only", *folders], capture_output=True, text=True, cwd=ROOT
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert sorted(map(sorted, found["reversed"])) == [
        ["hqq at 4 bits, group 64", "sinq at 4 bits, group 64"],
        ["rtn at 4 bits, group 64", "sinq at 4 bits, group 64"],
    ]


def test_a_single_draw_may_turn_what_all_of_them_leave_open(tmp_path):
    rows = [("rtn", drawn("rtn", 0.30, 0.0)), ("gptq", drawn("gptq", 0.30, 0.01))]
    for folder in ("first", "second"):
        save(tmp_path / folder, *(made for _, made in rows))
    found = compared(section_of(tmp_path / "first"), section_of(tmp_path / "second"))
    assert (found["apart_in_first"], found["reversed"]) == (0, [])
    assert found["with_a_single_draw"]["board_pairs"] == 25
    assert found["with_a_single_draw"]["with_any_reversed"] > 0


def test_a_text_is_cut_at_the_end_of_a_line(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("".join(f"line {n}\n" for n in range(9)))
    one, other = (path.read_text() for path in halves(text, tmp_path / "out"))
    assert one + other == text.read_text()
    assert one.endswith("\n")
    assert other.startswith("line")
