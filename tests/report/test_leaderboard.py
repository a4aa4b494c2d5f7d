"""The leaderboard's command line: formats, sections, ranks, marks, hostile files."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.cells import cell_len

from qbench.leaderboard import main
from qbench.record.quality import DivergenceRecord, IntervalRecord
from qbench.record.quantization import CalibrationRecord
from qbench.report import board, entries, published, terminal
from qbench.report.columns import order
from tests.record.test_result import timed
from tests.report.examples import failed, nll, point, save, tasked, with_identity

ANY = ("table", "md", "csv", "json", "tex", "html")


@pytest.fixture
def outputs(tmp_path):
    """Three clear places, of which the second is shared; one wins only by its size."""
    return save(
        tmp_path / "outputs",
        point("sinq", 4, nll(0.20, 1), bits=4.52),
        point("hqq", 4, nll(0.252, 2), bits=4.5),
        point("rtn", 4, nll(0.250, 3), bits=4.5),
        point("nf4", 4, nll(0.254, 5), bits=4.6),
        point("rtn", 3, nll(1.50, 4), bits=3.5),
    )


@pytest.fixture
def show(capsys):
    def call(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_ranks_are_shared_inside_the_noise_and_the_front_is_marked(outputs, show):
    status, out, _ = show(outputs, "--format", "csv")
    assert status == 0
    found = {(r["quantizer"], r["bits"]): (r["rank"], r["tied"], r["front"]) for r in rows(out)}
    assert found == {
        ("sinq", "4"): ("1", "False", "front"),
        ("rtn", "4"): ("2", "True", "front"),
        ("hqq", "4"): ("2", "True", "noise"),
        ("nf4", "4"): ("2", "True", ""),  # clearly beaten by sinq, which is smaller
        ("rtn", "3"): ("5", "False", "front"),
    }


def test_sorting_by_another_metric_keeps_the_ranks(outputs, show):
    found = rows(show(outputs, "--format", "csv", "--metric", "bits_per_weight")[1])
    assert [row["bits_per_weight"] for row in found] == ["3.5", "4.5", "4.5", "4.52", "4.6"]
    assert found[0]["rank"] == "5"


def test_two_protocols_never_share_a_section(outputs, show):
    save(outputs, point("sinq", 4, nll(0.1, 9), protocol="wikitext2:gptq-w2048"), point("sinq", 4, model="other"))
    document = json.loads(show(outputs, "--format", "json")[1])
    assert [(s["model"], s["protocol"], len(s["rows"])) for s in document] == [
        ("example", "mini:gptq-w512", 5),
        ("example", "wikitext2:gptq-w2048", 1),
        ("other", "mini:gptq-w512", 1),
    ]
    document = json.loads(show(outputs, "--format", "json", "--protocol", "wikitext2:gptq-w2048")[1])
    assert len(document) == 1


def test_one_row_per_configuration_the_latest(outputs, show):
    again, windows = point("sinq", 4, nll(0.1, 1), bits=4.52, version="0.2.0", day=9)
    again.config["runtime"] |= {"threads": 7, "min_coverage": 0.5}
    save(outputs, (again, windows))
    found = rows(show(outputs, "--format", "csv")[1])
    assert [row["qbench_version"] for row in found if row["quantizer"] == "sinq"] == ["0.2.0"]
    save(outputs, point("sinq", 4, nll(0.1, 1), options={"iterations": 2}), point("sinq", 4, options={"iterations": 3}))
    found = rows(show(outputs, "--format", "csv")[1])
    assert {row["options"] for row in found if row["quantizer"] == "sinq"} == {"", "iterations=2", "iterations=3"}


def test_calibration_is_no_difference_to_methods_that_have_none(outputs, show):
    one, windows = point("gptq", 4, nll(0.1, 1))
    calibration = CalibrationRecord("mini", "ab", "cd", 4, 2048)
    one = replace(one, quantization=replace(one.quantization, calibration=calibration))
    save(outputs, with_identity((one, windows), calibration={"text_sha256": "ab", "sequences": 4}))
    assert {row["options"] for row in rows(show(outputs, "--format", "csv")[1])} == {""}
    save(outputs, with_identity((one, windows), calibration={"text_sha256": "ab", "sequences": 8}))
    found = {row["options"] for row in rows(show(outputs, "--format", "csv")[1])}
    assert found == {"", "calibration.sequences=4", "calibration.sequences=8"}


def test_calibration_texts_of_one_name_are_told_apart(outputs, show):
    one, windows = point("gptq", 4, nll(0.1, 1))
    for sha256 in ("ab" * 32, "cd" * 32):
        calibration = CalibrationRecord("text.txt", sha256, "ef", 4, 2048)
        shown = replace(one, quantization=replace(one.quantization, calibration=calibration))
        save(outputs, with_identity((shown, windows), calibration={"text_sha256": sha256, "inputs": "original"}))
    found = {row["options"] for row in rows(show(outputs, "--format", "csv")[1])}
    assert found == {"", "calibration.text=text.txt@abababab", "calibration.text=text.txt@cdcdcdcd"}


def test_some_points_alone(outputs):
    chosen = [entry.result.run_id for entry in entries.read(outputs).entries if entry.quantizer == "rtn"]
    file = io.StringIO()
    terminal.show(outputs, chosen, file)
    assert file.getvalue().count("rtn") - file.getvalue().count("rtn at") == 2  # rows, sentences aside
    assert "sinq" not in file.getvalue()


def test_accuracies_are_sections_of_their_own_and_the_largest_comes_first(outputs, show):
    right = (np.arange(200) % 4 != 0).astype(float)
    wrong = right * (np.arange(200) % 3 != 0)
    save(outputs, tasked("rtn", wrong, nbits=3), tasked("sinq", right), tasked("hqq", np.roll(right, 1), bits=4.4))
    document = json.loads(show(outputs, "--format", "json", "--protocol", "lmeval:pair-v1-0shot")[1])
    acc, f1 = document
    assert [(r["quantizer"], r["acc"], r["rank"]) for r in acc["rows"]] == [
        ("hqq", 0.75, 1),
        ("sinq", 0.75, 1),
        ("rtn", 0.5, 3),
    ]
    assert [row["front"] for row in acc["rows"]] == ["front", "noise", "front"]
    assert [row["rank"] for row in f1["rows"]] == [None] * 3
    assert show(outputs, "--format", "html")[0] == 0


def test_divergence_has_columns_where_it_was_measured(outputs, show):
    result, windows = point("awq", 4, nll(0.25, 8))
    mean = IntervalRecord(0.0123, 0.01, 0.02)
    divergence = DivergenceRecord(
        1000, mean, mean, 0.01, 0.1, 0.3, 0.5, 1.0, 0.6, 0.01, 0.1, IntervalRecord(0.91, 0.9, 0.92), mean
    )
    save(outputs, (replace(result, evaluation=[replace(result.evaluation[0], divergence=divergence)]), windows))
    found = {row["quantizer"]: (row["kl"], row["top1_agreement"]) for row in rows(show(outputs, "--format", "csv")[1])}
    assert found["awq"] == ("0.0123", "0.91")
    assert found["sinq"] == ("", "")
    assert "0.0123" in show(outputs, "--metric", "kl")[1].splitlines()[4]


def test_where_keeps_the_rows_with_a_setting(outputs, show):
    assert len(rows(show(outputs, "--format", "csv", "--where", "quantizer=rtn")[1])) == 2
    assert len(rows(show(outputs, "--format", "csv", "--where", "quantizer=rtn", "--where", "nbits=3")[1])) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--metric", "siz"], "unknown metric 'siz'"),
        (["--protocol", "mini"], "unknown protocol 'mini'"),
        (["--where", "quantizer=sink"], "unknown quantizer 'sink'; did you mean 'sinq'?"),
        (["--where", "nbits"], "--where takes KEY=VALUE"),
        (["--where", "nbit=3"], "unknown setting 'nbit'"),
        (["--reference", "nowhere"], "unknown reference 'nowhere'"),
        (["--history", "--format", "html"], "--history has no HTML page"),
        (["-o", "/proc/nothing/x"], "cannot write"),
    ],
)
def test_wrong_requests_are_one_sentence(outputs, show, arguments, sentence):
    status, out, err = show(outputs, *arguments)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_folder_without_results(tmp_path, show):
    assert show(tmp_path / "absent")[0] == 2
    (tmp_path / "empty" / "results").mkdir(parents=True)
    for style in ANY:
        assert show(tmp_path / "empty", "--format", style)[0] == 0


def test_every_format_shows_every_row_and_the_suffix_chooses_it(outputs, show, tmp_path):
    for style in ANY:
        status, out, err = show(outputs, "--format", style)
        assert (status, err) == (0, "")
        assert all(out.count(name) >= 1 for name in ("sinq", "hqq", "rtn", "nf4"))
        target = tmp_path / f"new/board.{'txt' if style == 'table' else style}"
        assert show(outputs, "-o", target)[0] == 0
        if style != "html":  # which names the minute
            assert target.read_text() == out


def test_a_narrow_terminal_gets_the_first_columns_whole(outputs, capsys, monkeypatch):
    monkeypatch.setattr("qbench.leaderboard.width", lambda file: 80)
    assert main([str(outputs)]) == 0
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if "rank" in line)
    assert "perplexity" in head
    assert len(head) <= 80
    assert "quantizing" not in head
    assert "…" not in text
    assert "No room for: " in text


def test_columns_are_aligned_where_a_character_takes_two_places(tmp_path, show):
    outputs = save(tmp_path, point("方法", 4, nll(0.2, 1)), point("sinq", 4, nll(0.9, 2)))
    titles, rule, *lines = show(outputs)[1].splitlines()[2:6]
    assert {cell_len(line) for line in (titles, rule, *lines)} == {cell_len(rule)}
    assert rule.strip() == "─" * (cell_len(rule) - 1)
    method = titles.index("method")
    assert lines[0][method:].startswith("方法    ")
    assert lines[1][method:].startswith("sinq    ")


def test_latex_compiles_in_shape(outputs, show):
    out = show(outputs, "--format", "tex")[1]
    body = out.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 5
    columns = out.split(r"\begin{tabular}{")[1].split("}")[0]
    assert all(line.count(" & ") == len(columns) - 1 and line.endswith(r"\\") for line in body)
    assert r"95 \%" in out


def test_failed_points_are_told_until_they_are_made_good(outputs, show):
    save(outputs, failed(["model=example", "quantizer=gptq"], "out of memory", of=point("gptq")[0]))
    assert "failed point model=example quantizer=gptq: out of memory" in show(outputs)[2]
    assert "out of memory" in show(outputs, "--format", "html")[1]
    other = with_identity(point("gptq", day=2), quantizer={"group_size": 32})
    save(outputs, (replace(other[0], command=["model=example", "quantizer=gptq"]), other[1]))
    assert "out of memory" in show(outputs)[2]  # the same words, but not what had failed
    save(outputs, point("gptq", day=2))
    assert show(outputs)[2] == ""


def test_the_reason_of_a_failure_is_told_however_long_its_command(outputs, show):
    save(outputs, failed(["a=" + "x" * 4000], "out of memory"))
    told = show(outputs)[2]
    assert told.endswith(": out of memory\n")
    assert len(told) < 400


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "../../etc/passwd",
    "x" * 4000,
    "\U0001f600\u202eemoji",
    "a|b`c*d\n# e",
    r"\input{/etc/passwd} & 50% $x$ _y_ {z}",
    "=HYPERLINK(1)",
    "[bold red]x[/]",
    "\x1b[31mred\x07",
    "{{ 7 * 7 }}",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_harmlessly(outputs, show, name):
    save(outputs, point(name, 4, nll(0.3, 7), model=name, options={name: name}))
    for style in ANY:
        status, out, err = show(outputs, "--format", style)
        assert status == 0, err
        assert "sinq" in out
        readable = out.replace("\n", "")
        if style not in ("json", "csv"):
            assert "x" * 300 not in readable.partition('class="command"')[0]
        if style in ("table", "md", "tex", "csv"):
            assert all(c.isprintable() or c in " \u200d" for c in readable)
        if style == "md":
            assert "<script" not in out
            assert "\n# e" not in out
            assert "|b`c" not in out
        if style == "tex":
            assert r"\input" not in out
            assert "\U0001f600" not in out
        if style == "csv":
            assert all(row["model"][:1] != "=" for row in rows(out))
        if style == "html":
            assert "<script>alert" not in out
            assert "<img" not in out
            assert out.count("</script>") == 6  # the data and five scripts of ours
        if style == "json":
            assert name in {section["model"] for section in json.loads(out)}


def test_broken_files_are_named_and_never_stop_the_report(outputs, show):
    whole = next((outputs / "results").glob("*/result.json")).read_text()

    def put(folder, text):
        path = outputs / "results" / folder / "result.json"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

    put("truncated", whole[: len(whole) // 2])
    put("earlier-schema", whole.replace('"schema_version": 2', '"schema_version": 1'))
    put("later-schema", whole.replace('"schema_version": 2', '"schema_version": 3'))
    put("empty", "")
    put("no-object", "[1, 2]")
    put("deep", "[" * 100_000)
    put("surrogate", '{"run_id": "\udc80"}')
    put("odd-config", json.dumps(json.loads(whole) | {"config": {"model": 3, "quantizer": ["x"], "runtime": None}}))
    put(
        "outside",
        json.dumps(
            json.loads(whole) | {"evaluation": [json.loads(whole)["evaluation"][0] | {"window_nll_file": "../../x"}]}
        ),
    )
    (outputs / "results" / "folder" / "result.json").mkdir(parents=True)
    for style in ANY:
        status, out, err = show(outputs, "--format", style)
        assert status == 0
        assert "hqq" in out
        for name in (
            "truncated",
            "earlier-schema",
            "later-schema",
            "empty",
            "no-object",
            "deep",
            "surrogate",
            "folder",
        ):
            assert f"{name}/result.json" in err, name
        assert "schema_version: it is of version 1; measure the point again" in err
        assert "no intervals for outside" in err


def test_numbers_that_are_none_stay_out_of_the_ranking(outputs, show):
    result, windows = point("gptq", 4, nll(0.2))
    broken = replace(result, evaluation=[replace(result.evaluation[0], ppl=float("nan"), ppl_delta=float("inf"))])
    save(outputs, (broken, windows | {"quantized": windows["quantized"] * np.nan}))
    for style in ANY:
        assert show(outputs, "--format", style)[0] == 0
    document = json.loads(show(outputs, "--format", "json")[1])
    last = document[0]["rows"][-1]
    assert (last["quantizer"], last["ppl"], last["rank"], last["front"]) == ("gptq", None, None, "")


def ranked(document):
    return {row["quantizer"]: (row["rank"], row["tied"], row["front"]) for row in document[0]["rows"]}


LOSSES = {"rtn": 1.5, "hqq": 0.8, "sinq": 0.2, "awq": 0.5}


@pytest.mark.parametrize("broken", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_row_without_a_number_moves_no_other(tmp_path, show, broken, value):
    """Its windows may be finite or not: the row comes last, without a rank, and the others stay as they are."""
    points = {name: point(name, 4, nll(loss, i), bits=4 + i / 9) for i, (name, loss) in enumerate(LOSSES.items())}
    others = save(tmp_path / "without", *(each for name, each in points.items() if name != broken))
    expected = ranked(json.loads(show(others, "--format", "json")[1]))
    result, scores = points[broken]
    record = replace(result.evaluation[0], ppl=value)
    for number, windows in enumerate((scores["quantized"], scores["quantized"] * np.nan)):
        outputs = save(
            tmp_path / f"with-{number}",
            *(each for name, each in points.items() if name != broken),
            (replace(result, evaluation=[record]), scores | {"quantized": windows}),
        )
        document = json.loads(show(outputs, "--format", "json")[1])
        assert document[0]["rows"][-1]["quantizer"] == broken
        found = ranked(document)
        assert found.pop(broken) == (None, False, "")
        assert found == expected
        by_delta = json.loads(show(outputs, "--format", "json", "--metric", "kl")[1])  # which no row has
        assert [row["quantizer"] for row in by_delta[0]["rows"]] == [row["quantizer"] for row in document[0]["rows"]]


@pytest.mark.parametrize("metric", ["acc", "f1"])
def test_a_document_without_a_number_moves_no_other_accuracy(tmp_path, show, metric):
    right = (np.arange(200) % 4 != 0).astype(float)
    worse = right * (np.arange(200) % 3 != 0)
    none = right.copy()
    none[7] = np.nan
    outputs = save(tmp_path, tasked("sinq", right), tasked("rtn", worse), tasked("hqq", none))
    (section,) = (s for s in json.loads(show(outputs, "--format", "json")[1]) if "baseline_acc" in s)
    found = [(row["quantizer"], row["rank"]) for row in section["rows"]]
    assert found == [("sinq", 1), ("rtn", 2), ("hqq", None)]


def test_a_lost_file_of_the_best_row_leaves_the_others_their_weights(tmp_path, show):
    """RTN is better in the long windows and worse in the short ones: by tokens it is clearly better, by windows not."""
    tokens = np.array([1000.0, 10.0] * 12)
    hqq = nll(0.5, 1)
    rtn = hqq + np.array([-0.05, 0.05] * 12) + np.random.default_rng(3).normal(0, 0.002, 24)
    measured = [("sinq", nll(0.1, 2)), ("rtn", rtn), ("hqq", hqq)]
    points = [(result, scores | {"tokens": tokens}) for result, scores in (point(n, 4, w) for n, w in measured)]
    for number, (result, scores) in enumerate(points):
        value = float(np.exp((scores["quantized"] * tokens).sum() / tokens.sum()))
        points[number] = replace(result, evaluation=[replace(result.evaluation[0], ppl=value)]), scores
    whole = json.loads(show(save(tmp_path / "whole", *points), "--format", "json")[1])
    places = {name: rank for name, (rank, *_) in ranked(whole).items()}
    outputs = save(tmp_path / "lost", *points)
    best = points[0][0]
    (outputs / "results" / best.run_id / best.evaluation[0].window_nll_file).unlink()
    found = ranked(json.loads(show(outputs, "--format", "json")[1]))
    assert found["sinq"][0] is None
    others = {name: rank for name, (rank, *_) in found.items() if name != "sinq"}
    assert others == {name: places[name] - 1 for name in others}
    assert others == {"rtn": 1, "hqq": 2}


def test_extreme_numbers_never_stop_the_report(outputs, show):
    result, windows = point("extreme", 4, nll(0.2))
    del result.identity.quantizer["nbits"]
    speed = timed()
    still = replace(speed.baseline.decode.tokens_per_second, median=0.0)
    speed = replace(
        speed, baseline=replace(speed.baseline, decode=replace(speed.baseline.decode, tokens_per_second=still))
    )
    rows_of_layers = [replace(row, relative_error=1e300) for row in result.quantization.layers]
    for number, bits in enumerate((float("inf"), float("nan"))):
        quantization = replace(result.quantization, bits_per_weight=bits, layers=rows_of_layers)
        extreme = replace(result, run_id=f"{number}" * 16, quantization=quantization, speed=speed)
        save(outputs, (extreme, windows))
        for style in ANY:
            status, out, err = show(outputs, "--format", style)
            assert (status, err) == (0, "")
            assert "extreme" in out
    (row,) = (row for row in rows(show(outputs, "--format", "csv")[1]) if row["quantizer"] == "extreme")
    assert (row["bits"], row["decode_times"]) == ("", "")


def test_a_result_without_windows_has_no_rank(outputs, show):
    result, windows = point("gptq", 4, nll(0.2))
    none = replace(result, evaluation=[replace(result.evaluation[0], windows=0)])
    save(outputs, (none, {name: values[:0] for name, values in windows.items()}))
    status, out, err = show(outputs, "--format", "csv")
    assert status == 0
    assert "does not hold 0 finite window NLLs" in err
    assert [row["rank"] for row in rows(out) if row["quantizer"] == "gptq"] == [""]


def test_a_metric_may_have_any_name(outputs, show):
    result, scores = tasked("sinq", np.ones(8))
    record = result.tasks[0]
    metrics = [replace(record.metrics[0], name="=HYPERLINK(1)")]
    save(outputs, (replace(result, tasks=[replace(record, metrics=metrics)]), scores))
    head = show(outputs, "--format", "csv")[1].splitlines()[0]
    assert "'=HYPERLINK(1)" in head.split(",")
    assert not any(name.startswith("=") for name in head.split(","))


def test_single_windows_are_all_one_rank(tmp_path):
    outputs = save(tmp_path, point("rtn", 4, nll(0.5)[:1].repeat(24)[:24]), point("sinq", 4, nll(0.2)))
    sections = board.sections(entries.latest(entries.read(outputs).entries), *order("quality"))
    assert [row.rank for row in sections[0].rows] == [1, 2]


PUBLICATION = """
source: A paper, arXiv 0000.00000v1
entries:
  - {model: example, quantizer: sinq, nbits: 4, group_size: 64, protocol: "mini:gptq-w512", value: 31.5, where: Table 1}
  - {model: example, quantizer: rtn, nbits: 3, group_size: 128, protocol: "mini:gptq-w512", value: 99, where: Table 1}
  - {model: example, quantizer: hqq, nbits: 4, protocol: "mini:gptq-w1024", value: 98, where: Table 1}
  - {model: example, quantizer: sinq, settings: {codebook: nf4}, protocol: "mini:gptq-w512", value: 97, where: Table 2}
  - {model: example, quantizer: nf4, settings: {codebook: null}, protocol: "mini:gptq-w512", value: 40, where: Table 2}
  - {model: example, quantizer: none, protocol: "mini:gptq-w512", value: 27.5, where: Table 1}
"""


def test_published_numbers_stand_beside_ours_only_on_equal_terms(outputs, show, tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text(PUBLICATION)
    found = rows(show(outputs, "--format", "csv", "--reference", path)[1])
    assert [(r["quantizer"], r["published"], r["published_in"]) for r in found if r["published"]] == [
        ("sinq", "31.5", "A paper, arXiv 0000.00000v1, Table 1"),
        ("nf4", "40.0", "A paper, arXiv 0000.00000v1, Table 2"),
    ]
    for ours in (r for r in found if r["published"]):
        difference = float(ours["ppl"]) - float(ours["published"])
        assert float(ours["published_difference"]) == pytest.approx(difference)
    assert "16 bit, published: 27.500" in show(outputs, "--reference", path)[1]
    path.write_text(PUBLICATION.replace("value: 31.5", "value: low"))
    status, _, err = show(outputs, "--reference", path)
    assert status == 2
    assert "entries.0.value" in err
    path.write_text("a: [")
    assert "is not YAML" in show(outputs, "--reference", path)[2]


VARIANTS = """
source: A paper
entries:
  - {model: example, quantizer: sinq, nbits: 4, settings: {codebook: null}, protocol: "mini:gptq-w512", value: 31.5, where: uniform}
  - {model: example, quantizer: sinq, nbits: 4, settings: {codebook: nf4}, protocol: "mini:gptq-w512", value: 30.5, where: nf4}
"""  # noqa: E501


def test_variants_of_a_method_have_numbers_of_their_own(tmp_path, show):
    (tmp_path / "paper.yaml").write_text(VARIANTS)
    options = [{"codebook": None}, {"codebook": "nf4"}, {"codebook": "fp4"}]
    outputs = save(tmp_path / "outputs", *(point("sinq", 4, nll(0.2, i), options=o) for i, o in enumerate(options)))
    found = rows(show(outputs, "--format", "csv", "--reference", tmp_path / "paper.yaml")[1])
    assert sorted(r["published_in"] for r in found) == ["", "A paper, nf4", "A paper, uniform"]


def test_speed_has_columns_where_it_was_measured(tmp_path, show):
    outputs = save(tmp_path, point("rtn", 4, nll(0.3, 1)))
    assert "decode, tokens/s" not in show(outputs)[1]
    result, scores = point("sinq", 4, nll(0.2))
    save(outputs, (replace(result, speed=timed()), scores))
    (sinq, rtn) = rows(show(outputs, "--format", "csv", "--metric", "decode_tokens_per_second")[1])
    assert (sinq["decode_tokens_per_second"], sinq["decode_times"]) == ("20.0", "2.0")
    assert rtn["decode_times"] == ""
    assert "decode, tokens/s" in show(outputs)[1]


def test_the_publications_that_come_along_can_be_read():
    for name in published.available():
        assert published.read(name)


def test_history_names_the_change_and_nothing_else(tmp_path, show):
    outputs = save(
        tmp_path,
        point("sinq", 4, nll(0.20, 1), version="0.1.0", day=1),
        point("sinq", 4, nll(0.20, 1) + 1e-6, version="0.1.0", day=2),  # another summation order
        point("sinq", 4, nll(0.20, 5), version="0.2.0", day=3),  # moved, inside the noise
        point("sinq", 4, nll(0.30, 5), version="0.3.0", day=4),
        point("rtn", 4, nll(0.30, 5), version="0.3.0", day=5),
    )
    document = json.loads(show(outputs, "--history", "--format", "json", "--where", "quantizer=sinq")[1])
    (line,) = document
    assert [row["change_point"] for row in line["rows"]] == ["", "", "", "up: qbench 0.2.0 to 0.3.0"]
    assert [row["qbench_version"] for row in line["rows"]] == ["0.1.0", "0.1.0", "0.2.0", "0.3.0"]
    assert "1 change point in 4 records" in show(outputs, "--history")[1]


def test_the_history_of_one_metric_holds_no_other(tmp_path, show):
    right = (np.arange(200) % 4 != 0).astype(float)
    outputs = save(tmp_path, tasked("sinq", right, day=1), tasked("sinq", right, day=2, version="0.2.0"))
    document = json.loads(show(outputs, "--history", "--format", "json")[1])
    assert [[row.get("acc", row.get("f1")) for row in line["rows"]] for line in document] == [[0.75, 0.75], [0.5, 0.5]]
    assert not any(row["change_point"] for line in document for row in line["rows"])


def test_history_of_bytes_names_any_difference(tmp_path, show):
    outputs = save(
        tmp_path,
        point("sinq", 4, bits=4.5, version="0.1.0", day=1),
        point("sinq", 4, bits=4.5, version="0.2.0", day=2),
        point("sinq", 4, bits=4.6, version="0.3.0", day=3),
    )
    document = json.loads(show(outputs, "--history", "--format", "json", "--metric", "model_bytes")[1])
    assert [bool(row["change_point"]) for row in document[0]["rows"]] == [False, False, True]
    seconds = json.loads(show(outputs, "--history", "--format", "json", "--metric", "quant_seconds")[1])
    assert not any(row["change_point"] for row in seconds[0]["rows"])
