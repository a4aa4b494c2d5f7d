"""JsonLines keeps qbench's contracts."""

import json

from qbench_example.json_lines import JsonLines

from qbench.testing import TrackerConformance


class TestJsonLines(TrackerConformance):
    def make(self):
        return JsonLines()

    def runs(self, folder):
        lines = (json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines())
        return {line["run"]: line for line in lines}

    def break_service(self, monkeypatch):
        def broken(*args):
            raise OSError("no room")

        monkeypatch.setattr(JsonLines, "_append", broken)
