"""The table of an anatomy: which points are its rows, what they add up to, what the page draws of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qbench.leaderboard import main
from qbench.record.quantization import LayerRow
from qbench.report import anatomy, entries
from tests.report.examples import point, save, with_identity
from tests.report.test_verdicts import diverged

KINDS = ("self_attn.q_proj", "mlp.down_proj")
BLOCKS = 4


def layer(kind: str, block: int) -> LayerRow:
    imbalance = 2.0 + block  # grows with depth, as the KL below does
    numbers = {"relative_error": 0.1, "imbalance_before": imbalance, "kurtosis_before": 3.0 - block}
    return LayerRow(
        f"model.layers.{block}.{kind}", (8, 16), "rtn", "cpu", 0.1, 3.5, 56, imbalance_after=None, kurtosis_after=3.0,
        **numbers,
    )  # fmt: skip


def part(only: str, kl: float, rows: list[LayerRow]):
    result, files = diverged(point("partly", 3), kl)
    result = replace(result, quantization=replace(result.quantization, layers=rows))
    return with_identity((result, files), quantizer={"name": "partly", "method": "rtn", "only": only})


@pytest.fixture
def outputs(tmp_path):
    """A whole of 1.0 nats; kinds of 0.3 and 0.5; blocks of 0.1, 0.2, 0.3 and 0.4; and a point that is no part."""
    every = [layer(kind, block) for block in range(BLOCKS) for kind in KINDS]
    made = [part("*", 1.0, every)]
    for kind, kl in zip(KINDS, (0.3, 0.5), strict=True):
        made.append(part(f"*.{kind}", kl, [row for row in every if row.name.endswith(kind)]))
    made += [part(f"model.layers.{b}.*", (b + 1) / 10, [layer(k, b) for k in KINDS]) for b in range(BLOCKS)]
    made += [part("*proj", 0.7, every), point("sinq", 3)]
    return save(tmp_path / "outputs", *made)


@pytest.fixture
def found(outputs):
    parts, rest = anatomy.split(entries.read(outputs).entries)
    assert sorted(entry.identity.quantizer["name"] for entry in rest) == ["partly", "sinq"]
    [one] = anatomy.anatomies(parts, outputs)
    return one


def test_rows_stand_in_the_order_of_the_model(found):
    table = anatomy.table(found)
    levels = ["whole", "kind", "kind", *["block"] * BLOCKS]
    assert [row[table.keys.index("level")] for row in table.values] == levels
    assert [row[0] for row in table.values][:3] == ["*", *(f"*.{kind}" for kind in KINDS)]
    assert table.cells[1][table.titles.index("of the whole's")] == "30.0%"
    assert "rtn at 3 bits, group 64" in table.title


def test_the_sentences_say_what_adds_up_and_what_costs_most(found):
    additive, kind, block, correlated = found.sentences
    assert "KL of 1.0000 nats" in additive
    assert "2 kinds alone add up to 0.8000, 0.80 times that" in additive
    assert "4 blocks alone add up to 1.0000, 1.00 times that" in additive
    assert "*.mlp.down_proj: 62% of the kinds' sum, with 50% of the weights" in kind
    assert "model.layers.3.*: 40% of the blocks' sum" in block
    assert "imbalance 1.00" in correlated
    assert "kurtosis -1.00" in correlated


def test_the_page_draws_cells_from_the_margins_and_says_so(found):
    drawn = anatomy.drawn(found)
    assert drawn["measured"] is False
    assert len(drawn["cells"]) == len(KINDS) * BLOCKS
    cell = next(c for c in drawn["cells"] if (c["kind"], c["block"]) == ("mlp.down_proj", 3))
    assert cell["kl"] == pytest.approx(0.5 * 0.4 / 0.9)
    assert cell["imbalance"] == pytest.approx(5.0)


def test_a_table_reads_outlines_and_a_page_is_written(outputs, tmp_path, capsys):
    assert main([str(outputs), "--format", "json"]) == 0
    board, parts = json.loads(capsys.readouterr().out)
    assert {row["quantizer"] for row in board["rows"]} == {"sinq", "partly"}
    assert parts["rows"][0]["kl"] == 1.0
    assert main([str(outputs), "-o", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert 'data-anatomy="0"' in text
    assert json.loads(text.partition('id="data">')[2].partition("</script>")[0])["anatomies"][0]["measured"] is False
