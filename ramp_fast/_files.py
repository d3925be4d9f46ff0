"""Opening what others have put on the disk: regular files only, text in bounded memory, and messages of one line.

And files that are whole or not there.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
import unicodedata
from pathlib import Path
from typing import BinaryIO

MAX_TEXT_BYTES = 64 * 2**20
"""Far beyond any list of names or annotation; a larger file was named by mistake."""

HOST = hashlib.sha256(socket.gethostname().encode("utf-8", "replace")).hexdigest()[:8]
"""This computer, in names of temporary files."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """What has this name is not a regular file; the message says what it is."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    Opening a named pipe waits for its writer, perhaps for ever, and opening a device may do anything.

    Raises
    ------
    NotRegularError
        It is a directory, a named pipe, a socket or a device.
    OSError
        It cannot be opened.
    """
    try:
        _check_regular(os.stat(path).st_mode)
        # Without O_NONBLOCK a pipe that has taken the name since would be waited for all the same.
        file = os.fdopen(os.open(path, _FLAGS), "rb")
    except ValueError as error:  # a zero byte within the name
        raise FileNotFoundError(f"no such file ({error})") from error
    try:
        _check_regular(os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise NotRegularError(f"{kind}, not a file")


def read_text(path: str | Path, most: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put first, with line feeds as line ends.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is not UTF-8 text, or larger than ``most`` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"more than {most // 2**20} MB")
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def temporary_name() -> str:
    """A name that no other process, on this computer or another, gives a file."""
    return f".ramp_fast-{HOST}-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def write_whole(path: Path, data: bytes) -> None:
    """A file that has its name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / temporary_name()
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written, in one line and without its name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def printable(text: str) -> str:
    """The text as one line that can be shown: control characters and broken names as escapes."""
    if text.isprintable():
        return text
    return "".join(c if _can_be_shown(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _can_be_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # other spaces, in Japanese names
