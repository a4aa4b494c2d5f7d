"""Files as users have them: line ends, marks, archives, tables and encodings; read as they are or refused."""

import gzip
import json
import zlib

import pyarrow
import pytest
from pyarrow import parquet

from qbench.config import CalibrationConfig
from qbench.errors import RequestError
from qbench.evaluate.files import lines, read_rows
from qbench.evaluate.protocols.pages import JoinedPages
from qbench.evaluate.protocols.windows import TextWindows
from qbench.evaluate.text import read_calibration

# characters at which str.splitlines splits and a line does not end
WITHIN = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
ESCAPED = [c for c in WITHIN if c < " "]  # JSON takes them in a string only escaped


def task(path, **changes):
    return TextWindows(name="t", path=str(path), **changes)


def pages(path, content, **changes):
    path.write_bytes(content)
    return JoinedPages(name="t", path=str(path), **changes).read().content


def json_lines(texts, end="\n"):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


@pytest.mark.parametrize("mark", [c for c in WITHIN if c not in ESCAPED], ids=repr)
def test_a_line_of_json_holds_what_json_allows_in_a_string(tmp_path, mark):
    assert pages(tmp_path / "c4.jsonl", json_lines([f"a{mark}b", "c"])) == [f"a{mark}b", "c"]


@pytest.mark.parametrize("mark", ["\x00", "\r", *ESCAPED], ids=repr)
def test_a_control_character_is_escaped_in_json(tmp_path, mark):
    assert pages(tmp_path / "c4.jsonl", json_lines([f"a{mark}b"])) == [f"a{mark}b"]
    with pytest.raises(RequestError, match="line 2 is not a JSON object"):
        pages(tmp_path / "c4.jsonl", b'{"text": "c"}\n{"text": "a' + mark.encode() + b'b"}\n')


def test_blank_lines_and_marks_around_json_lines_are_no_rows(tmp_path):
    path = tmp_path / "c4.jsonl"
    for content in (
        json_lines(["a", "b"], end="\r\n"),
        json_lines(["a", "b"]).rstrip(),
        json_lines(["a", "b"]) + b"\n",
        json_lines(["a", "b"], end="\n \t\r\n"),
        b"\xef\xbb\xbf" + json_lines(["a", "b"]),
    ):
        assert pages(path, content) == ["a", "b"]
        assert pages(path, gzip.compress(content)) == ["a", "b"]  # told by its first bytes
    assert pages(path, json_lines(["\U0001f600"]).replace("\U0001f600".encode(), b"\\ud83d\\ude00")) == ["\U0001f600"]
    with pytest.raises(RequestError, match=r"line 3 holds \\ud83d, half of a surrogate pair"):
        pages(path, json_lines(["a", "b"]) + b'{"text": "c \\ud83d"}\n')
    with pytest.raises(RequestError, match=r"line 3 is not a JSON object"):
        pages(path, b'\n{"text": "a"}\n["b"]\n')


@pytest.mark.parametrize("mark", ["\x00", *WITHIN], ids=repr)
def test_a_row_of_a_text_file_ends_at_a_newline_alone(tmp_path, mark):
    path = tmp_path / "wiki.raw"
    path.write_bytes(f"one{mark}two\n \nthree".encode())
    assert task(path, separator="|").read().content == f"one{mark}two\n||three"
    assert lines(f"{mark}\r\n\n{mark}") == [f"{mark}\r\n", "\n", mark]


def test_a_text_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("one\r\ntwo\rthree\n\n", "a\x00b", "\x0c\n", "tail\ufeff"):
        path.write_bytes(content.encode())
        assert task(path).read().content == content
        config = CalibrationConfig(name="file", path=str(path))
        assert read_calibration(config).content == content
    path.write_bytes(b"\xef\xbb\xbfone")
    assert task(path).read().content == "one"


def test_parquet_gives_the_hubs_rows(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    rows = [" = A = \n", "", " b\u2028 \n", "c"]
    parquet.write_table(pyarrow.table({"text": rows, "n": range(4)}), path)
    assert JoinedPages(name="t", path=str(path)).read().content == rows
    assert task(path, separator="|").read().content == " = A = \n|| b\u2028 \n|c"
    assert task(path).read().content == "\n\n".join(rows)
    assert read_rows(path, "task.path")[2] == {"text": " b\u2028 \n", "n": 2}
    with pytest.raises(RequestError, match=r"line 1 has no text under 'page'; set task\.column=NAME, there is text, n"):
        task(path, column="page").read()
    content = path.read_bytes()
    renamed = tmp_path / "data"
    renamed.write_bytes(content)
    assert task(renamed, separator="|").read().content == " = A = \n|| b\u2028 \n|c"
    path.write_bytes(content[:-20])
    with pytest.raises(RequestError, match=r"cannot read task\.path=.*damaged"):
        task(path).read()
    path.write_bytes(b"text")
    with pytest.raises(RequestError, match="is no parquet file"):
        task(path).read()


def damaged_by_a_bit() -> bytes:
    """A gzip file with a flipped bit that zlib itself notices."""
    packed = gzip.compress(json_lines([f"{i} {i * i}" for i in range(200)]), mtime=0)
    for at in range(80, len(packed) * 8 - 80):
        broken = bytearray(packed)
        broken[at // 8] ^= 1 << at % 8
        try:
            gzip.decompress(bytes(broken))
        except zlib.error:
            return bytes(broken)
        except Exception:
            continue
    raise AssertionError("no such bit")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json.gz", damaged_by_a_bit(), r"cannot read task\.path=.*damaged"),
        ("a.json.gz", gzip.compress(b"a" * 999, mtime=0)[:-9], r"cannot read task\.path=.*damaged"),
        ("a.json.gz", b"plain text", r"cannot read task\.path=.*damaged"),
        ("a.json.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd00", "is packed with zstd"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "is UTF-16"),
        ("a.txt", "text".encode("utf-16-be"), "is UTF-16"),
        ("a.txt", "text".encode("utf-32"), "UTF-32"),
        ("a.txt", "caf\xe9".encode("latin-1"), r"is not UTF-8 text \(byte 3\)"),
        ("a.txt", b"\xed\xa0\xbd", r"is not UTF-8 text \(byte 0\)"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=sentence):
        (JoinedPages(name="t", path=str(path)) if name.startswith("a.json") else task(path)).read()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(RequestError, match="is a folder; give a file in it"):
        task(tmp_path).read()
