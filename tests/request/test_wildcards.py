"""Patterns of files in a sweep become the files that match."""

import pytest

from qbench.errors import RequestError
from qbench.request.overrides import parse
from qbench.request.wildcards import spelled_out


@pytest.fixture
def folder(tmp_path):
    for name in ("b-Q4_K.gguf", "a [1], x.gguf", 'c"q\\.gguf', "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def values(argument):
    return [getattr(value, "text", value) for value in parse(argument).sweep_iterator()]


def test_a_pattern_is_every_match_in_order(folder):
    found = values(spelled_out(f"files={folder}/*.gguf"))
    assert found == sorted(str(path) for path in folder.glob("*.gguf"))


def test_patterns_and_names_together(folder):
    found = spelled_out(f"+quantizer.path={folder}/b-*.gguf,hub:ORG/NAME/x.gguf")
    assert found == f'+quantizer.path=choice("{folder}/b-Q4_K.gguf","hub:ORG/NAME/x.gguf")'


def test_what_has_no_pattern_is_left_alone():
    for argument in ("files=a,b", "quantizer=rtn", "task.path=x*", "files=null"):
        assert spelled_out(argument) == argument


def test_no_match_is_refused(folder):
    with pytest.raises(RequestError, match="matches no file") as refusal:
        spelled_out(f"files={folder}/*.safetensors")
    assert refusal.value.key == "files"
