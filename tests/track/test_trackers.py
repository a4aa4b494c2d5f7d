"""The built-in trackers pass the conformance suite, wandb with its stand-in."""

import pytest

from qbench.testing import TrackerConformance
from qbench.track.tracker import NoTracker, without_places
from qbench.track.wandb import WandB
from tests.track import wandb_stub


class TestNone(TrackerConformance):
    sends_nothing = True

    def make(self):
        return NoTracker()

    def runs(self, folder):
        return {path.name: None for path in folder.iterdir()}

    def break_service(self, monkeypatch):
        pass


class TestWandB(TrackerConformance):
    @pytest.fixture(autouse=True)
    def stub(self, monkeypatch):
        monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
        self.told = wandb_stub.install(monkeypatch)

    def make(self):
        return WandB(project="p", mode="offline")

    def runs(self, folder):
        kept = {path.name.rpartition("-run-")[2].partition("-")[2] for path in folder.glob("wandb/offline-run-*")}
        sent = {run.about["id"]: ({k: v for k, v in run.about.items() if k != "dir"}, run.logged, run.summary)
                for run in self.told}  # fmt: skip
        assert kept == sent.keys()  # dir is where it writes on this machine
        return sent

    def break_service(self, monkeypatch):
        import wandb

        monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("no route")))


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("outputs/a", "outputs/a"),
        ("/data/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("cannot read '/data/x y': no", "cannot read 'x y': no"),
        ("cannot read /data/a/b.json, nor ~me/c", "cannot read b.json, nor c"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("tokens/second", "tokens/second"),
        ({"a": ["/", 1, None, "/x/y"]}, {"a": ["/", 1, None, "y"]}),
    ],
)
def test_folders_are_taken_out_of_what_is_sent(text, sent):
    assert without_places(text) == sent
