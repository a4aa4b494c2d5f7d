"""Patterns of files in a sweep become the files that match."""

import pytest

from qbench.config import Config
from qbench.errors import RequestError
from qbench.request.overrides import parse
from qbench.request.wildcards import check_read, spelled_out


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


def test_a_name_with_a_line_break_is_refused_by_its_name(folder):
    (folder / "two\nlines.gguf").touch()
    with pytest.raises(RequestError, match=r"files=.*matches '.*two\\nlines.gguf'.*rename it"):
        spelled_out(f"files={folder}/*.gguf")


def test_files_that_no_point_reads_are_refused():
    ours, theirs = Config(files="x.gguf"), Config(files="x.gguf")
    ours.quantizer, theirs.quantizer = {"name": "sinq"}, {"name": "file"}
    check_read([ours, theirs])
    check_read([])
    with pytest.raises(RequestError, match="which is not asked for") as refusal:
        check_read([ours])
    assert refusal.value.key == "files"
