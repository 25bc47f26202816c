"""Files that are written whole or not at all, and that replace nothing but files."""
from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

#: errors of writing, which the system reports without the file's name
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def written(path: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, opened at once: what cannot be written is refused before anything is computed.

    A regular file is written beside its place and moved there at the end of the block; if the block fails, or is
    interrupted, what was there before stays. It keeps the permissions of the file that it replaces, and symbolic links
    to it stay links. Pipes, devices and standard output, whatever it is, are written into.

    Raises
    ------
    ValueError
        If the path is a folder or in no folder, or if there is a file already and `force` is false.
    OSError
        If the system refuses to write, with the path as its file name.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a folder (name a file in it)")
    standard_output = is_standard_output(path)
    streams = found is not None and (standard_output or stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode))
    if found is not None and not (streams or force):
        raise ValueError(f"{path} exists (--force overwrites it)")
    target = Path(os.path.realpath(path))
    if found is None and not target.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {target.parent}")
    try:
        if found is None or (stat.S_ISREG(found.st_mode) and not standard_output):
            with _moved_into(target, found, force) as file:
                yield file
        else:
            with io.BufferedWriter(_Stream(os.dup(1) if standard_output else path, "w")) as file:
                yield file
    except OSError as error:
        if error.filename is None and error.errno in _NO_ROOM:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class _Stream(io.FileIO):
    """What is written once from front to back, though devices may say that they can be read anywhere."""

    def seekable(self) -> bool:
        """Never."""
        return False

    def tell(self) -> int:
        """Refused, so that nobody counts on coming back."""
        raise io.UnsupportedOperation("this is written from front to back")


@contextmanager
def _moved_into(target: Path, found: os.stat_result | None, force: bool) -> Iterator[BinaryIO]:
    """A file beside `target`, moved there at the end; `found` is what is replaced."""
    if found is not None:
        target.open("r+b").close()  # a file that may not be changed is not replaced either
    part = target.with_name(f".densegrad-{secrets.token_hex(8)}.part")
    try:
        try:
            file = part.open("xb")
        except OSError as error:
            reason = f"{error.strerror} (a new file in the folder {target.parent})"
            raise OSError(error.errno, reason, str(target)) from error
        with file:
            if found is not None:
                with suppress(PermissionError, AttributeError):  # whose it is stays too, where the system allows that
                    os.chown(part, found.st_uid, found.st_gid)
                part.chmod(stat.S_IMODE(found.st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not force and os.path.lexists(target):
            raise ValueError(f"{target} exists by now (--force overwrites it)")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def is_standard_output(path: Path) -> bool:
    """Whether what is written there goes where this process's results go."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False
