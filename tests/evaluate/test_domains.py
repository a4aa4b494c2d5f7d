"""`task=domains`: every kind is scored as if it were alone, and what stands over all of them is made of the kinds."""

import copy
import hashlib
import json
from importlib import resources

import numpy as np
import pytest
import torch

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate.draws import merged
from qbench.evaluate.protocols.domains import NOT_A_KIND, Domains
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.leaderboard import main as leaderboard
from tests.conftest import refused

CPU = RuntimeConfig(device="cpu")
EMBEDDED = {f.name: f for f in resources.files("qbench.texts.domains").iterdir() if f.name.endswith(".txt")}
SETTINGS = {"short_window": 24, "max_windows": 2, "window": 48, "pieces": 2}


def evaluation(tokenizer, **changes):
    task = Domains(**SETTINGS | changes)
    task.check(CPU)
    source = task.read()
    task.check_length(source)
    return task.prepare(source, tokenizer, CPU)


def noisy(model):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "layers" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2 * weight.std(correction=0))
    return other


@pytest.fixture(scope="module")
def scored(tiny):
    model, tokenizer = tiny
    joined = evaluation(tokenizer, kinds=["german", "japanese", "long", "python"])
    variant = noisy(model)
    baseline = joined.score_baseline(model)
    return joined, model, variant, joined.records(joined.score(variant, baseline), baseline, False)


def test_each_text_is_the_one_whose_licence_and_hash_are_recorded():
    told = dict(line.split()[::-1] for line in EMBEDDED[NOT_A_KIND].read_text().splitlines() if line.endswith(".txt"))
    texts = {name: file.read_bytes() for name, file in EMBEDDED.items() if name != NOT_A_KIND}
    assert told == {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    assert "Apache-2.0" in EMBEDDED[NOT_A_KIND].read_text()
    assert len(texts) >= 8
    assert all(len(content) >= 15_000 for content in texts.values()), {k: len(v) for k, v in texts.items()}


def test_no_text_repeats_itself_or_another():
    """A line of some length stands once in all of them, and not in what else is embedded."""
    others = [resources.files("qbench.texts") / name for name in ("mini.txt", "mini-calibration.txt")]
    seen = {}
    for name, file in [*EMBEDDED.items(), *((other.name, other) for other in others)]:
        if name != NOT_A_KIND:
            for line in file.read_text(encoding="utf-8").splitlines():
                if len(line) > 50:
                    assert line not in seen, f"{name} and {seen[line]}: {line[:60]}"
                    seen[line] = name


def test_all_kinds_by_name_are_all_kinds():
    every = sorted(name.removesuffix(".txt") for name in EMBEDDED if name != NOT_A_KIND)
    said, unsaid = Domains(kinds=every[::-1]), Domains()
    assert said.settings() == unsaid.settings()
    assert said.read().sha256 == unsaid.read().sha256 != Domains(kinds=every[1:]).read().sha256
    assert [*said.read().texts] == every
    assert unsaid.protocol_name(unsaid.read()) == f"domains:{len(every)}kinds-w256-first6-long3x2048"
    assert unsaid.scored_tokens(unsaid.read()) == 13 * 6 * 256 + 3 * 2048


def test_a_kind_is_scored_as_it_would_be_alone(scored):
    joined, model, variant, (records, _, files) = scored
    for (name, part), record in zip(joined.parts.items(), records, strict=True):
        assert isinstance(part, WindowedEvaluation)
        own = part.score_baseline(model)
        [alone], _, kept = part.records(part.score(variant, own), own, False)
        assert record == alone, name
        assert np.array_equal(files[record.window_nll_file]["kl"], kept[alone.window_nll_file]["kl"])


def test_names_say_the_kind_and_the_cut(scored):
    _, _, _, (records, [task], _) = scored
    assert [r.protocol for r in records] == [
        "domains:german-w24-first2",
        "domains:japanese-w24-first2",
        "domains:long-w48-first2",
        "domains:python-w24-first2",
    ]
    assert task.protocol == "domains:4kinds-w24-first2-long2x48"
    assert {(r.window_tokens, r.windows) for r in records} == {(24, 2), (48, 2)}


def test_the_mean_and_the_worst_are_those_of_the_kinds(scored):
    _, _, _, (records, [task], files) = scored
    kl, ppl = task.metrics
    each = [r.divergence.kl.value for r in records]
    assert kl.value == pytest.approx(np.mean(each))
    assert kl.kinds == dict(zip(("german", "japanese", "long", "python"), each, strict=True))
    assert kl.kinds[kl.worst_kind] == max(each) > min(each) > 0
    assert ppl.value == pytest.approx(np.exp(np.mean(np.log([r.ppl for r in records]))))
    assert ppl.baseline == pytest.approx(np.exp(np.mean(np.log([r.baseline_ppl for r in records]))))
    assert files[task.scores_file]["quantized/domains/kl_mean,none"].tolist() == each


def test_a_pass_reads_windows_of_both_lengths(scored, tiny):
    """Batches of two lengths follow one another, and each row's logits go to its own kind."""
    joined, model, _, _ = scored
    asks = joined.asks()
    reader = asks.reader(None)
    with torch.inference_mode():
        for b, rows in enumerate(asks.batches):
            for row, logits in enumerate(model(torch.from_numpy(rows)).logits):
                reader.see(b, row, logits, None)
    assert {batch.shape[1] for batch in asks.batches} == {23, 47}
    kept = joined.score_baseline(model)
    for name, values in reader.scores().items():
        assert np.allclose(values, kept[name], rtol=1e-5), name


def test_of_several_draws_the_kinds_are_their_means(scored):
    joined, model, _, one = scored
    baseline = joined.score_baseline(model)
    other = joined.records(joined.score(model, baseline), baseline, False)
    records, [task], _ = merged([one, other])
    kl = task.metrics[0]
    assert kl.kinds == pytest.approx({kind: value / 2 for kind, value in one[1][0].metrics[0].kinds.items()})
    assert kl.value == pytest.approx(np.mean([*kl.kinds.values()]))
    assert len(records) == 4


@pytest.mark.slow
def test_the_board_has_a_column_for_each_kind_and_names_the_worst(qbench, capsys):
    asked = ["model=tiny-dense", "task=domains", "task.kinds=[german,long,python]"]
    asked += ["task.short_window=32", "task.max_windows=2", "task.window=64", "task.pieces=2"]
    for nbits in (2, 4):
        outcome = qbench(*asked, "quantizer=rtn", f"quantizer.nbits={nbits}")
        assert outcome.status == 0, outcome.stderr
        assert "worst on" in outcome.stderr
    assert leaderboard(["outputs", "--format", "json", "--protocol", "domains:3kinds-w32-first2-long2x64"]) == 0
    [kl, ppl] = json.loads(capsys.readouterr().out)
    assert {"kl_mean_german", "kl_mean_long", "kl_mean_python"} <= set(kl["rows"][0])
    assert {"ppl_german", "ppl_long", "ppl_python"} <= set(ppl["rows"][0])
    assert ppl["rows"][0]["worst_kind"] is None
    for row in kl["rows"]:
        each = {kind: row[f"kl_mean_{kind}"] for kind in ("german", "long", "python")}
        assert row["worst_kind"] == max(each, key=each.get)
        assert row["kl_mean"] == pytest.approx(np.mean([*each.values()]))
    assert any("in times of the mean over all kinds" in note for note in kl["notes"])
    assert any("3 kinds of text" in note for note in [*kl["notes"], *ppl["notes"]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ["germen"]}, "german"),
        ({"path": "nowhere"}, "not a folder"),
        ({"short_window": 100}, "task.short_window"),
        ({"max_windows": 100_000}, "task.max_windows"),
    ],
)
def test_a_wrong_request_is_one_sentence(tiny, changes, words):
    with pytest.raises(RequestError) as found:
        evaluation(tiny[1], **{"kinds": ["german"]} | changes)
    assert words in refused(found.value)
