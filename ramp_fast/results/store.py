"""Results on disk: written whole or not at all, and recognised as finished by the settings that made them."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ramp_fast._checks import flag
from ramp_fast._files import HOST, open_regular, reason, temporary_name
from ramp_fast.errors import RampFastError
from ramp_fast.results.marks import NPZ_EXTRA, NPZ_TAIL, PNG_CHUNK, SOFTWARE, is_replaceable

__all__ = [
    "DamagedResultError",
    "Result",
    "State",
    "Store",
    "StoreError",
    "atomic_folder",
    "atomic_write",
    "check_free",
    "check_writable",
    "encoded_picture",
    "fingerprint",
    "read_result",
    "remove_leftovers",
    "save_picture",
]

_TEMPORARY = re.compile(rf"\.{SOFTWARE}-(?P<host>[0-9a-f]{{8}})-(?P<process>[0-9]+)-[0-9a-f]{{12}}\.tmp")

# Temporary files that this process is writing.
_under_way: set[str] = set()


class StoreError(RampFastError):
    """A result cannot be written; the message says why."""


class DamagedResultError(StoreError, ValueError):
    """A file is not a whole result of this package."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete.

    Parameters
    ----------
    path : str or pathlib.Path
        Its final name. Missing folders are made.

    Yields
    ------
    file object
        A temporary file in the same folder, moved to ``path`` at the end and removed on any exception,
        ``KeyboardInterrupt`` included.

    Raises
    ------
    OSError
        The file cannot be written.

    Notes
    -----
    Not flushed to the disk for each file: after a power failure a file may be incomplete, which
    `Store.is_finished` notices. What a killed process leaves is for `remove_leftovers`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A short name of its own: the final one may already be as long as the file system allows. Created by
    # open, not by tempfile, so that the user's umask sets the permissions.
    temporary = target.parent / temporary_name()
    _under_way.add(temporary.name)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _under_way.discard(temporary.name)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete, in the place of what was there.

    Parameters
    ----------
    path : str or pathlib.Path
        Its final name. The caller has seen to it that nothing is lost with what is there. A link is followed.

    Yields
    ------
    pathlib.Path
        A temporary folder beside it, moved to ``path`` at the end and removed on any exception.

    Raises
    ------
    OSError
        It cannot be written.

    Notes
    -----
    Between the removal of the old folder's name and the new one's getting it a kill leaves none.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = target.parent / temporary_name(), target.parent / temporary_name()
    _under_way.update((fresh.name, old.name))
    try:
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _under_way.difference_update((fresh.name, old.name))


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders that killed processes have left in a folder.

    Those of processes that are running, or that ran on another computer, are left alone.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return  # not made yet, or for the writing to complain about
    for name in names:
        found = _TEMPORARY.fullmatch(name)
        if found and found["host"] == HOST and name not in _under_way and not _runs(int(found["process"])):
            path = Path(folder, name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether another process of that number is running."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where the question below would be an order
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's, or nobody can say
        return True
    return True


def check_free(path: str | Path) -> None:
    """Refuse to write over a file that this package did not write.

    Raises
    ------
    StoreError
        There is such a file, or something that is no file.
    OSError
        The name cannot be looked at, as one that is too long.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if is_replaceable(path):
            return
        why = "has no mark of ramp-fast"
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError)
        why = "is a link to nothing" if dangling else f"cannot be told from a file of yours ({reason(error)})"
    raise StoreError(f"{path} {why}, so it is kept: move it away, or choose another --out")


def encoded_picture(picture: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """A picture as PNG, marked as made by this package.

    Parameters
    ----------
    picture : PIL.Image.Image
        Any mode that PNG holds.
    text : mapping of str to str, optional
        Further entries.
    """
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    for key, value in (text or {}).items():
        info.add_text(key, value)
    info.add(PNG_CHUNK, SOFTWARE.encode(), after_idat=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_picture(path: str | Path, picture: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, marked as made by this package.

    Parameters
    ----------
    path : str or pathlib.Path
        Ends in ``.png``.
    picture, text
        As for `encoded_picture`.
    """
    data = encoded_picture(picture, text)
    with atomic_write(path) as file:
        file.write(data)


def fingerprint(path: str | Path) -> dict[str, object]:
    """What tells one version of a photograph from another: size, time of modification and SHA-256.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        return {"size": status.st_size, "modified": status.st_mtime_ns, "sha256": _digest(file)}


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _file_digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none that can be read."""
    try:
        with open_regular(path) as file:
            return _digest(file)
    except OSError:
        return None


_HEX_DIGITS = 64
"""Of a SHA-256."""


class State(enum.Enum):
    """What is there of a result."""

    FINISHED = "all of its files are there, whole, and belong together"
    MISSING = "a file is missing, or was made from something else"
    DAMAGED = "its map is damaged"
    MIXED = "its picture is damaged, or belongs to another map"


@dataclass(frozen=True)
class Result:
    """One image's attribution.

    Attributes
    ----------
    map : numpy.ndarray
        ``[C, H, W]``, float32 or float64: relevance of each channel of each pixel the model saw.
    target : int
        The class explained.
    logits : numpy.ndarray
        ``[classes]``, the model's output.
    class_names : list of str
        ``[classes]``, ``class K`` where no name is known.
    """

    map: npt.NDArray[np.floating[Any]]
    target: int
    logits: npt.NDArray[np.floating[Any]]
    class_names: list[str]

    def probability(self) -> float:
        """Softmax probability of the target, in [0, 1]; of a single logit the sigmoid."""
        logits = self.logits.astype(np.float64)
        if logits.size == 1:  # is the first of two, of which the other is 0
            logits = np.append(logits, 0.0)
        weights = np.exp(logits - np.max(logits))
        return float(weights[self.target] / weights.sum())


class Store:
    """The folder of results of one run.

    Parameters
    ----------
    folder : str or pathlib.Path
        Output folder; made when missing.
    settings : mapping of str to JSON values
        All that a result depends on except the image itself. A finished file counts only under equal settings.
    overlays : bool
        Whether a picture belongs to each result.

    Raises
    ------
    StoreError
        The folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object], overlays: bool = True) -> None:
        flag("Store", "overlays", overlays)
        self.folder = Path(folder)
        self.overlays = overlays
        # Through JSON once, so that tuples and lists compare as they will when read back.
        self.settings: dict[str, object] = json.loads(json.dumps(dict(settings)))
        self._names: tuple[list[str], bytes] | None = None
        self._tidied: Path | None = None
        check_writable(folder)

    def map_path(self, key: str) -> Path:
        """Where the map of ``key`` lies."""
        return self.folder / f"{key}.npz"

    def picture_path(self, key: str) -> Path:
        """Where the overlay of ``key`` lies."""
        return self.folder / f"{key}.png"

    def is_finished(self, key: str, source: str | Path) -> bool:
        """Whether a whole result of the same image under the same settings is there; see `state`."""
        return self.state(key, source) is State.FINISHED

    def state(self, key: str, source: str | Path) -> State:
        """What is there of a result.

        Parameters
        ----------
        key : str
            Relative to the folder, without suffix.
        source : str or pathlib.Path
            The image: it must be the one that was attributed, see `fingerprint`.
        """
        self._tidy(key)
        path = self.map_path(key)
        try:
            if not os.path.lexists(path) or not is_replaceable(path):
                return State.MISSING
            stored = read_result(path)
            settings, picture = json.loads(str(stored["settings"])), str(stored["picture"])
        except (OSError, ValueError, KeyError):
            return State.DAMAGED
        try:
            if settings != self._settings_of(fingerprint(source)):
                return State.MISSING
        except OSError:
            return State.MISSING  # for the reading of it to complain about
        return self._state_of_picture(key, picture)

    def _state_of_picture(self, key: str, wanted: str) -> State:
        """``wanted`` is the SHA-256 of the picture that belongs to the map, empty where it has none."""
        path = self.picture_path(key)
        if wanted and _file_digest(path) == wanted:
            return State.FINISHED
        if not os.path.lexists(path):
            return State.MISSING if self.overlays else State.FINISHED
        try:
            foreign = not is_replaceable(path)
        except OSError:
            foreign = True
        return State.FINISHED if foreign and not self.overlays else State.MIXED

    def check_free(self, key: str, source: str | Path) -> None:
        """Refuse to write a result over files that this package did not write.

        Raises
        ------
        StoreError
            There is such a file.
        OSError
            The name cannot be looked at, as one that is too long.
        """
        picture = self.picture_path(key)
        if self.overlays:
            if picture.exists() and os.path.samefile(picture, source):
                raise StoreError(f"{picture} is the image itself; choose another --out")
            check_free(picture)
        check_free(self.map_path(key))

    def save(
        self,
        key: str,
        source: str | Path,
        result: Result,
        picture: Image.Image | None = None,
        image: Mapping[str, object] | None = None,
    ) -> None:
        """Write a result; the map comes last and names its picture, so that neither counts without the other.

        Parameters
        ----------
        key : str
            Relative to the folder, without suffix.
        source : str or pathlib.Path
            The image it was made from.
        result : Result
            What to write.
        picture : PIL.Image.Image, optional
            Its overlay. Without it an overlay of an earlier run is removed.
        image : mapping, optional
            The image's `fingerprint` from before it was read; by default that of now.

        Raises
        ------
        StoreError
            A file that this package did not write has that name.
        OSError
            The file cannot be written.
        """
        self.check_free(key, source)
        settings = self._settings_of(fingerprint(source) if image is None else image)
        digest = ""
        if picture is None:
            self._remove_own(self.picture_path(key))
        else:
            data = encoded_picture(picture)
            digest = hashlib.sha256(data).hexdigest()
            with atomic_write(self.picture_path(key)) as file:
                file.write(data)
        archive = self._archive(result, source, settings, digest)
        with atomic_write(self.map_path(key)) as file:
            file.write(archive)

    def discard(self, key: str, source: str | Path | None = None) -> None:
        """Remove what an earlier run has left of a result, where it is this package's.

        Parameters
        ----------
        key : str
            Relative to the folder, without suffix.
        source : str or pathlib.Path, optional
            The image, which is never removed: a damaged one may look like the remains of a picture.
        """
        for path in (self.map_path(key), self.picture_path(key)):
            if source is None or os.path.realpath(path) != os.path.realpath(source):
                self._remove_own(path)

    def _remove_own(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if is_replaceable(path):
                path.unlink()

    def picture_digests(self, keys: Iterable[str]) -> dict[str, str | None]:
        """SHA-256 of the pictures of ``keys``, None where there is none."""
        return {key: _file_digest(self.picture_path(key)) for key in keys}

    def _tidy(self, key: str) -> None:
        folder = self.map_path(key).parent
        if folder != self._tidied:
            remove_leftovers(folder)
            self._tidied = folder

    def _settings_of(self, image: Mapping[str, object]) -> dict[str, object]:
        return {**self.settings, "image": dict(image)}

    def _archive(self, result: Result, source: str | Path, settings: Mapping[str, object], picture: str) -> bytes:
        top = np.argsort(-result.logits, kind="stable")[:5].astype(np.int64)
        arrays = {
            "map": result.map,
            "target": np.int64(result.target),
            "class_name": np.str_(result.class_names[result.target]),
            "probability": np.float32(result.probability()),
            "logits": result.logits,
            "top_classes": top,
            "top_names": np.array([result.class_names[int(k)] for k in top]),
            "settings": np.str_(json.dumps(settings, sort_keys=True)),
            "source": np.str_(os.fspath(source)),
            "picture": np.str_(picture),
        }
        buffer = io.BytesIO()
        # np.savez compresses all or nothing: maps hardly shrink and are slow to deflate, names shrink 30-fold.
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                archive.writestr(_entry(name, b"" if archive.filelist else NPZ_EXTRA), _npy(np.asarray(array)))
            archive.writestr(_entry("class_names"), self._npy_names(result.class_names), zipfile.ZIP_DEFLATED)
            archive.comment = NPZ_TAIL + bytes(_HEX_DIGITS)
        body = buffer.getvalue()[:-_HEX_DIGITS]
        return body + hashlib.sha256(body).hexdigest().encode()

    def _npy_names(self, names: list[str]) -> bytes:
        if self._names is None or self._names[0] is not names:
            self._names = (names, _npy(np.array(names)))
        return self._names[1]


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _entry(name: str, extra: bytes = b"") -> zipfile.ZipInfo:
    # A fixed date: equal results are equal files.
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    entry.extra = extra
    return entry


def check_writable(folder: str | Path) -> None:
    """Make a folder, try to write into it, and remove what killed runs have left there.

    Raises
    ------
    StoreError
        It has no name, cannot be made, is a file, or cannot be written to.
    """
    if not os.fspath(folder):  # which pathlib takes for the current folder
        raise StoreError("the output folder has an empty name; '.' is the current folder")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / temporary_name()
        probe.touch(exist_ok=False)
        probe.unlink()
    except FileExistsError as error:
        what = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
        raise StoreError(f"cannot write to the output folder {path}: it is {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte within the name
        raise StoreError(f"cannot write to the output folder {path}: {reason(error)}") from error
    remove_leftovers(path)


def read_result(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Read a stored result.

    Parameters
    ----------
    path : str or pathlib.Path
        A ``.npz`` written by `Store.save`.

    Returns
    -------
    dict of str to numpy.ndarray
        ``map`` [C, H, W], ``target``, ``class_name``, ``probability``, ``logits`` [classes],
        ``class_names`` [classes], ``top_classes`` and ``top_names`` [5 at most], ``settings`` (JSON), ``source``,
        ``picture`` (SHA-256 of the overlay, empty without one).

    Raises
    ------
    OSError
        The file cannot be read.
    DamagedResultError
        Not such a file, or not to the last byte as it was written. It is a ValueError.
    """
    damaged = f"{path} is not a whole result of ramp-fast"
    with open_regular(path) as file:
        # The mark first: a file of another kind may be of any size.
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - len(NPZ_TAIL) - _HEX_DIGITS))
        if not file.read().startswith(NPZ_TAIL):
            raise DamagedResultError(damaged)
        file.seek(0)
        data = file.read()
    body, digest = data[:-_HEX_DIGITS], data[-_HEX_DIGITS:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedResultError(damaged)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # only a file that was made to deceive gets here
        raise DamagedResultError(f"{damaged}: {reason(error)}") from error
