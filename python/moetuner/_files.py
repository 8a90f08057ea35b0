"""Output files that are either complete or absent."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota, a limit: Python does not say of which file."""
_unfinished: set[Path] = set()
"""Temporary files of this process."""


def remove_unfinished() -> None:
    """Leave no temporary file where the process is ended in the middle of one."""
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends well.

    The temporary file lies in the same folder, so the final rename is atomic;
    when the block raises, it is removed and an existing `path` stays as it was. A
    link is followed; a device or a pipe is written in place, as it cannot be replaced.
    An error that there is no room names `path`.
    """
    with naming_what_is_full(path), _temporary_path(Path(path)) as temporary:
        yield temporary


@contextmanager
def naming_what_is_full(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors that there is no room say that it is for `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            error.filename = os.fspath(path)
        raise


@contextmanager
def _temporary_path(target: Path) -> Iterator[Path]:
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    target = target.resolve()
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    _unfinished.add(temporary)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: all of it, or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8: all of it, or nothing."""
    atomic_write_bytes(path, text.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
