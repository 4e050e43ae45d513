"""Writing files: whole or not at all, at once or beside other work."""

import threading

import pytest

from conrad_engine import files
from conrad_engine.errors import InputError
from conrad_engine.files import BackgroundWriter, make_folder, write_atomic


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        make_folder(tmp_path / "x" / "y")


def test_a_file_is_written_beside_other_work_and_before_the_next(tmp_path, monkeypatch):
    may_go_on, begun = threading.Event(), []

    def slow(path, content):
        begun.append(path.name)
        assert may_go_on.wait(20)
        write_atomic(path, content)

    monkeypatch.setattr(files, "write_atomic", slow)
    with BackgroundWriter() as writer:
        writer.write(tmp_path / "a", b"1")
        assert not (tmp_path / "a").exists(), "it goes on while this does"
        may_go_on.set()
        writer.write(tmp_path / "b", b"2")
        assert (tmp_path / "a").read_bytes() == b"1"
    assert (tmp_path / "b").read_bytes() == b"2" and begun == ["a", "b"]


def test_what_could_not_be_written_beside_other_work_is_said_once(tmp_path):
    gone = tmp_path / "gone" / "a"
    with pytest.raises(InputError, match="cannot write"), BackgroundWriter() as writer:
        writer.write(gone, b"1")
    with BackgroundWriter() as writer:
        writer.write(gone, b"1")
        with pytest.raises(InputError, match="cannot write"):
            writer.write(tmp_path / "b", b"2")
        writer.write(tmp_path / "b", b"2")
    assert (tmp_path / "b").read_bytes() == b"2"
    with pytest.raises(InputError, match="cannot write"), BackgroundWriter() as writer:
        writer.write(gone, b"1")
        raise KeyError("the file matters more")
