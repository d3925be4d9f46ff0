"""Results on disk: written whole or not at all, and recognised as finished by the settings that made them."""

from __future__ import annotations

import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ramp_fast.data.images import SOFTWARE
from ramp_fast.errors import RampFastError

__all__ = ["Result", "Store", "StoreError", "atomic_write", "check_writable", "read_result", "save_picture"]


class StoreError(RampFastError):
    """A result cannot be written; the message says why."""


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
    `Store.is_finished` notices.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A short name of its own: the final one may already be as long as the file system allows. Created by
    # open, not by tempfile, so that the user's umask sets the permissions.
    temporary = target.parent / f".{SOFTWARE}-{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_picture(path: str | Path, picture: Image.Image) -> None:
    """Write a PNG atomically, marked as made by this package.

    Parameters
    ----------
    path : str or pathlib.Path
        Ends in ``.png``.
    picture : PIL.Image.Image
        Any mode that PNG holds.
    """
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=info)


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
        weights = np.exp(logits - logits.max())
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
        self.folder = Path(folder)
        self.overlays = overlays
        # Through JSON once, so that tuples and lists compare as they will when read back.
        self.settings: dict[str, object] = json.loads(json.dumps(dict(settings)))
        self._names: tuple[list[str], bytes] | None = None
        check_writable(self.folder)

    def map_path(self, key: str) -> Path:
        """Where the map of ``key`` lies."""
        return self.folder / f"{key}.npz"

    def picture_path(self, key: str) -> Path:
        """Where the overlay of ``key`` lies."""
        return self.folder / f"{key}.png"

    def is_finished(self, key: str, source: str | Path) -> bool:
        """Whether a complete result of the same image under the same settings is there.

        Parameters
        ----------
        key : str
            Relative to the folder, without suffix.
        source : str or pathlib.Path
            The image: it must have the size and time of modification it had when it was attributed.
        """
        if self.overlays and not self.picture_path(key).is_file():
            return False
        try:
            with np.load(self.map_path(key), allow_pickle=False) as stored:
                return bool(json.loads(str(stored["settings"])) == self._settings_of(source))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return False

    def save(self, key: str, source: str | Path, result: Result, picture: Image.Image | None = None) -> None:
        """Write a result; the map comes last, so that its presence says that all is there.

        Parameters
        ----------
        key : str
            Relative to the folder, without suffix.
        source : str or pathlib.Path
            The image it was made from.
        result : Result
            What to write.
        picture : PIL.Image.Image, optional
            Its overlay.

        Raises
        ------
        StoreError
            A file that this package did not write has that name.
        OSError
            The file cannot be written.
        """
        self._keep_foreign(key, source)
        if picture is not None:
            save_picture(self.picture_path(key), picture)
        with atomic_write(self.map_path(key)) as file:
            self._write(file, result, source)

    def _settings_of(self, source: str | Path) -> dict[str, object]:
        status = os.stat(source)
        return {**self.settings, "image": [status.st_size, status.st_mtime_ns]}

    def _keep_foreign(self, key: str, source: str | Path) -> None:
        picture, numbers = self.picture_path(key), self.map_path(key)
        if self.overlays and picture.exists():
            if os.path.samefile(picture, source):
                raise StoreError(f"{picture} is the image itself; choose another --out")
            try:
                with Image.open(picture) as image:
                    ours = image.info.get("Software") == SOFTWARE
            except (OSError, ValueError, SyntaxError):
                ours = False
            if not ours:
                raise StoreError(f"{picture} is not a result of ramp-fast, so it is kept; choose another --out")
        if numbers.exists():
            try:
                with np.load(numbers, allow_pickle=False) as stored:
                    ours = "settings" in stored
            except (OSError, ValueError, zipfile.BadZipFile, EOFError):
                # Nothing readable: what a power failure leaves of our own files looks the same.
                ours = True
            if not ours:
                raise StoreError(f"{numbers} is not a result of ramp-fast, so it is kept; choose another --out")

    def _write(self, file: IO[bytes], result: Result, source: str | Path) -> None:
        top = np.argsort(-result.logits, kind="stable")[:5].astype(np.int64)
        arrays = {
            "map": result.map,
            "target": np.int64(result.target),
            "class_name": np.str_(result.class_names[result.target]),
            "probability": np.float32(result.probability()),
            "logits": result.logits,
            "top_classes": top,
            "top_names": np.array([result.class_names[int(k)] for k in top]),
            "settings": np.str_(json.dumps(self._settings_of(source), sort_keys=True)),
            "source": np.str_(os.fspath(source)),
        }
        # np.savez compresses all or nothing: maps hardly shrink and are slow to deflate, names shrink 30-fold.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                archive.writestr(_entry(name), _npy(np.asarray(array)))
            archive.writestr(_entry("class_names"), self._npy_names(result.class_names), zipfile.ZIP_DEFLATED)

    def _npy_names(self, names: list[str]) -> bytes:
        if self._names is None or self._names[0] is not names:
            self._names = (names, _npy(np.array(names)))
        return self._names[1]


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    # A fixed date: equal results are equal files.
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


def check_writable(folder: str | Path) -> None:
    """Make a folder and try to write into it.

    Raises
    ------
    StoreError
        It cannot be made, is a file, or cannot be written to.
    """
    path = Path(folder)
    probe = path / f".{SOFTWARE}-{secrets.token_hex(6)}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise StoreError(f"cannot write to the output folder {path}: {reason}") from error


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
        ``class_names`` [classes], ``top_classes`` and ``top_names`` [5 at most], ``settings`` (JSON), ``source``.

    Raises
    ------
    OSError, ValueError
        Not such a file.
    """
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
