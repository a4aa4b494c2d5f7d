"""The protocols that ship keep the contract of qbench.testing, and the suite notices one that breaks it."""

import json
import random
from dataclasses import dataclass, replace

import pytest

from qbench.evaluate.protocols.crops import PageCrops
from qbench.evaluate.protocols.domains import Domains
from qbench.evaluate.protocols.lmeval import LmEval
from qbench.evaluate.protocols.pages import JoinedPages
from qbench.evaluate.protocols.windows import TextWindows
from qbench.evaluate.protocols.written import SelfWritten
from qbench.evaluate.windowed import WindowedEvaluation
from qbench.evaluate.written import FORMAT
from qbench.testing import ProtocolConformance

SHORT = {"name": "t", "window": 24, "max_windows": 3}
CHANGING = ({"window": 20}, {"max_windows": 2}, {"add_bos_token": True})
NONSENSE = ({"window": 1}, {"max_windows": 0})

TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: replaced.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def words(seed, count=60):
    return " ".join(random.Random(seed).choices(["river", "stone", "cloud", "violin"], k=count))


class TestWindows(ProtocolConformance):
    protocol = TextWindows
    changing = (*CHANGING, {"add_bos_token": False})
    nonsense = NONSENSE

    def settings(self):
        return dict(SHORT)

    def text(self, folder, seed):
        (folder / "text.txt").write_text(words(seed))
        return {"path": str(folder / "text.txt")}


class OfPages(ProtocolConformance):
    nonsense = NONSENSE

    def settings(self):
        return dict(SHORT)

    def text(self, folder, seed):
        rows = [json.dumps({"text": words(100 * seed + n)}) for n in range(6)]
        (folder / "pages.jsonl").write_text("\n".join(rows))
        return {"path": str(folder / "pages.jsonl")}


class TestCrops(OfPages):
    protocol = PageCrops
    changing = CHANGING
    nonsense = (*NONSENSE, {"max_windows": None})


class TestPages(OfPages):
    protocol = JoinedPages
    changing = (*CHANGING, {"pages": 4})
    nonsense = (*NONSENSE, {"pages": 0}, {"pages": None})

    def settings(self):
        return SHORT | {"pages": 5}


class TestDomains(ProtocolConformance):
    protocol = Domains
    changing = (*CHANGING, {"short_window": 12}, {"pieces": 1}, {"pieces": None})
    nonsense = (*NONSENSE, {"short_window": 1}, {"short_window": 25}, {"pieces": 0}, {"kinds": []})

    def settings(self):
        return SHORT | {"short_window": 16, "pieces": 2}

    def text(self, folder, seed):
        for n, kind in enumerate(("stones", "rivers", "long")):
            (folder / f"{kind}.txt").write_text(words(10 * seed + n))
        return {"path": str(folder)}


class TestWritten(ProtocolConformance):
    protocol = SelfWritten
    changing = ({"answers": 2}, {"tokens": 6})
    nonsense = ({"answers": 0}, {"tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"window": 8})

    def settings(self):
        return {"answers": 3, "tokens": 8, "window": 40}

    def text(self, folder, seed):
        draw = random.Random(seed)
        prompts, answers = ([draw.choices(range(256), k=n) for n in sizes] for sizes in ((5, 9, 7), (8, 8, 8)))
        sampling = {"answers": 3, "tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0}
        held = {"format": FORMAT, "chat": False, "sampling": sampling, "prompts": prompts, "answers": answers}
        (folder / "self.json").write_text(json.dumps(held))
        return {"path": str(folder / "self.json")}


class TestRolling(ProtocolConformance):
    protocol = LmEval
    changing = ({"window": 20}, {"limit": 1}, {"add_bos_token": False})
    nonsense = ({"names": []}, {"limit": 0}, {"num_fewshot": -1}, {"names": ["wikitext", "wikitext"]}, {"window": 1})

    def settings(self):
        return {"names": ["wikitext"], "window": 24}

    def text(self, folder, seed):
        (folder / "wiki.raw").write_text("".join(f" = {n} = \n {words(10 * seed + n, 9)}\n" for n in range(3)))
        return {"path": str(folder / "wiki.raw")}


class TestTasks(ProtocolConformance):
    protocol = LmEval
    changing = ({"window": 100}, {"limit": 3}, {"num_fewshot": 1})
    nonsense = ({"names": ["own", "piqa"]},)

    def settings(self):
        return {"names": ["own"], "window": 128}

    def text(self, folder, seed):
        rows = [{"q": words(seed + n, 2), "choices": ["river", "stone"], "label": n % 2} for n in range(6)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / "own.yaml").write_text(TASK)
        return {"path": str(folder / "questions.jsonl"), "include_path": str(folder / "tasks")}


# Protocols that are broken in one way each, and the contract that must notice.


@dataclass(frozen=True, kw_only=True)
class Nameless(TextWindows):
    def protocol_name(self, text):
        return f"{text}:windows"


@dataclass(frozen=True, kw_only=True)
class Careless(TextWindows):
    def check(self, runtime):
        pass


@dataclass(frozen=True, kw_only=True)
class Placed(TextWindows):
    def settings(self):
        return super().settings() | {"path": self.path}


@dataclass(frozen=True)
class OffByOne(WindowedEvaluation):
    def records(self, scores, baseline, baseline_cached):
        [record], tasks, files = super().records(scores, baseline, baseline_cached)
        return [replace(record, ppl=record.ppl + 1)], tasks, files


@dataclass(frozen=True, kw_only=True)
class Shifted(TextWindows):
    def prepare(self, source, tokenizer, runtime):
        return OffByOne(self.cut(source, tokenizer), source, self, runtime)


@dataclass(frozen=True)
class Unsettled(WindowedEvaluation):
    def score(self, model, baseline):
        scores = super().score(model, baseline)
        return scores | {"token_nll": scores["token_nll"] + random.random() / 100}


@dataclass(frozen=True, kw_only=True)
class Drifting(TextWindows):
    def prepare(self, source, tokenizer, runtime):
        return Unsettled(self.cut(source, tokenizer), source, self, runtime)


@dataclass(frozen=True)
class Shifting(WindowedEvaluation):
    def score(self, model, baseline):
        scores = super().score(model, baseline)
        return scores | {"token_nll": scores["token_nll"] + 0.01}


@dataclass(frozen=True, kw_only=True)
class Mixed(TextWindows):
    def prepare(self, source, tokenizer, runtime):
        return Shifting(self.cut(source, tokenizer), source, self, runtime)


@dataclass(frozen=True, kw_only=True)
class Foreign(TextWindows):
    def cut(self, source, tokenizer):
        cut = super().cut(source, tokenizer)
        return replace(cut, ids=cut.ids + 10_000)


@pytest.mark.parametrize(
    ("broken", "contract"),
    [
        (Nameless, "test_what_changes_the_number_is_in_the_name"),
        (Careless, "test_nonsense_is_refused_in_one_sentence"),
        (Placed, "test_a_text_is_known_by_its_content"),
        (Shifted, "test_a_difference_is_that_of_the_two_numbers"),
        (Shifted, "test_what_is_kept_gives_the_number_again"),
        (Drifting, "test_it_is_deterministic"),
        (Drifting, "test_a_model_beside_itself_differs_by_nothing"),
        (Mixed, "test_a_pass_finds_what_the_model_as_a_whole_gives"),
        (Foreign, "test_ids_are_of_the_vocabulary"),
    ],
)
def test_a_broken_protocol_is_noticed(broken, contract, tmp_path):
    suite = TestWindows()
    suite.protocol = broken
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(suite, contract)(tmp_path)
