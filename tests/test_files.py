import os
import stat

import pytest
from moetuner._files import atomic_path, atomic_write_bytes, atomic_write_text


def names(folder):
    return [file.name for file in folder.iterdir()]


def test_text_is_written_as_utf8(tmp_path):
    file = tmp_path / "a.json"
    atomic_write_text(file, "é\n")
    assert file.read_bytes() == b"\xc3\xa9\n"
    assert names(tmp_path) == ["a.json"]


def test_an_old_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.bin"
    atomic_write_bytes(file, b"long old content")
    atomic_write_bytes(file, b"new")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_when_writing_fails_the_old_file_remains(tmp_path, error):
    """Half of the new content was written: nobody ever sees it."""
    file = tmp_path / "a.txt"
    file.write_text("old")

    with pytest.raises(error), atomic_path(file) as temporary:
        temporary.write_text("ne")
        raise error
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_nothing_is_left_where_nothing_was(tmp_path):
    with pytest.raises(InterruptedError), atomic_path(tmp_path / "a.txt"):
        raise InterruptedError
    assert names(tmp_path) == []


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    """A plotting library chooses its format by it."""
    with atomic_path(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    """Not those of a private temporary file; and the mask itself is left alone."""
    old = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "a", "")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
        assert os.umask(umask) == umask
    finally:
        os.umask(old)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "none" / "a", "")


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        atomic_write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"


def test_a_device_or_pipe_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write_text(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
