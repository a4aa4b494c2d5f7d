"""model=ORG/NAME on the command line."""

import pytest

from qbench.request.hubnames import spelled_out


@pytest.mark.parametrize("value", ["Qwen/Qwen3-8B", "org-1/a_b.c", "'org/name'"])
def test_a_repository_becomes_model_hub(value):
    found = spelled_out(["quantizer=rtn", f"model={value}", "model.revision=main"])
    assert found == ["quantizer=rtn", "model=hub", f"model.id={value.strip(chr(39))}", "model.revision=main"]


@pytest.mark.parametrize(
    "argument",
    [
        "model=tiny-dense",
        "model=a/b,c/d",  # a sweep's list: each point is spelled out on its own
        "model=/absolute/path",
        "model=a/b/c",
        "model=a/b c",
        "model.path=a/b",
        "quantizer=upstream/sinq",
        "model=",
        "-m",
    ],
)
def test_everything_else_is_left_alone(argument):
    assert spelled_out([argument]) == [argument]


def test_an_option_in_a_folder_of_the_group_is_no_repository(monkeypatch):
    monkeypatch.setattr("qbench.request.options.options", lambda group: {"mine/large": ""} if group == "model" else {})
    assert spelled_out(["model=mine/large"]) == ["model=mine/large"]


def test_a_missing_id_is_said(qbench):
    outcome = qbench("model=hub")
    assert outcome.status == 2
    assert "model.id is not set; say model=ORG/NAME" in outcome.stderr
