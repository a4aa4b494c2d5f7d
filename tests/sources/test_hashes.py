"""Files are hashed once: what is remembered is not read again, and what has changed in any way is."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.checkpoint import manifest
from qbench.errors import RequestError
from qbench.sources import hashes
from qbench.sources.local import Local


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were written a moment ago are remembered; nothing is left over from another test."""
    monkeypatch.setattr(hashes, "SETTLED_S", -1)
    monkeypatch.setattr(hashes, "_unsaved", {})


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read."""
    names, real = [], manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda path: names.append(path.name) or real(path))
    return names


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


def hashed(paths):
    with hashes.remembered_in(Path("outputs")):
        return hashes.sha256_of(paths)


def test_the_second_time_nothing_is_read(files, read):
    expected = [sha256(path) for path in files]
    assert hashed(files) == expected
    assert sorted(read) == sorted(path.name for path in files)
    read.clear()
    assert hashed([*files, files[0]]) == [*expected, expected[0]]
    assert read == []
    assert not any(path.name in Path("outputs/hashes.json").read_text() for path in files)


def same_size_and_mtime(path):
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_inode(path):
    before, new = path.stat(), path.with_name("new")
    new.write_bytes(b"y" * before.st_size)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize("change", [same_size_and_mtime, another_inode, lambda p: p.write_bytes(b"longer" * 9999)])
def test_a_changed_file_is_read_again_and_the_others_are_not(files, read, change):
    hashed(files)
    read.clear()
    change(files[1])
    assert hashed(files)[1] == sha256(files[1])
    assert read == [files[1].name]


def test_what_changed_a_moment_ago_is_not_remembered(files, read, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_S", 60)
    hashed(files)
    assert not Path("outputs/hashes.json").exists()
    hashed(files)
    assert len(read) == 2 * len(files)


def test_what_changes_while_it_is_read_is_not_remembered(files, monkeypatch):
    real = manifest.file_sha256

    def slow(path):
        found = real(path)
        path.write_bytes(b"other content")
        return found

    monkeypatch.setattr(manifest, "file_sha256", slow)
    hashed(files[:1])
    monkeypatch.setattr(manifest, "file_sha256", real)
    assert hashed(files[:1]) == [sha256(files[0])]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"a": 1}', b'{"a"', b"[" * 100_000])
def test_a_damaged_memory_is_ignored_and_mended(files, read, content):
    Path("outputs/hashes.json").write_bytes(content)
    assert hashed(files) == [sha256(path) for path in files]
    assert set(json.loads(Path("outputs/hashes.json").read_bytes()).values()) == {sha256(path) for path in files}


def test_a_digest_that_is_none_is_not_believed(files):
    hashed(files)
    damaged = {key: value[:63] for key, value in json.loads(Path("outputs/hashes.json").read_bytes()).items()}
    Path("outputs/hashes.json").write_text(json.dumps(damaged))
    assert hashed(files) == [sha256(path) for path in files]


def test_no_folder_is_made_and_what_was_hashed_is_saved_once_there_is_one(files, read):
    Path("outputs").rmdir()
    hashed(files)
    assert not Path("outputs").exists()
    Path("outputs").mkdir()
    hashes.save(Path("outputs"))
    read.clear()
    hashed(files)
    assert read == []


def test_a_folder_that_cannot_be_written_is_no_failure(files, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashes, "write_atomically", full)
    assert hashed(files) == [sha256(path) for path in files]


HASH = """
import sys
from pathlib import Path
from qbench.sources import hashes
hashes.SETTLED_S = -1
for _ in range(20):
    for path in map(Path, sys.argv[1:]):
        with hashes.remembered_in(Path("outputs")):
            hashes.sha256_of([path])
"""


@pytest.mark.slow
def test_processes_that_save_at_once_leave_a_whole_file(files, read):
    started = [subprocess.Popen([sys.executable, "-c", HASH, str(path), str(files[2])]) for path in files[:2]]
    assert [process.wait(120) for process in started] == [0, 0]
    assert hashed(files) == [sha256(path) for path in files]
    assert len(read) <= 1  # at most what one of them lost to the other
    assert [path.name for path in Path("outputs").iterdir()] == ["hashes.json"]


@pytest.mark.slow
def test_the_second_run_of_a_point_does_not_read_the_weights(qbench, tiny, tmp_path, read):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    request = ("model=local", f"model.path={tmp_path / 'model'}", "quantizer=rtn", "task.max_windows=1")
    assert qbench(*request, "--dry-run").status == 0
    assert not Path("outputs").exists()
    first = qbench(*request)
    assert first.status == 0, first.stderr
    assert read.count("model.safetensors") == 1
    read.clear()
    second = qbench(*request)
    assert second.summary["run_id"] == first.summary["run_id"]
    assert read == []
    again = Local(path=str(tmp_path / "model")).fingerprint()
    assert second.summary["fingerprint"] == again
    assert read.count("model.safetensors") == 1  # nothing was said of outputs/


@pytest.mark.parametrize("what", ["dangling link", "folder"])
def test_what_cannot_be_read_is_said_by_its_name(tmp_path, what):
    path = tmp_path / "model.safetensors"
    path.symlink_to("absent") if what == "dangling link" else path.mkdir()
    with pytest.raises(RequestError, match=r"cannot read .*model.safetensors: (No such file|Is a directory)"):
        hashes.sha256_of([path])
