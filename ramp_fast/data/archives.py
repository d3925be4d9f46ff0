"""Images in archives, which are unpacked nowhere: tar, tars within a tar, webdataset shards, zip, Parquet."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ramp_fast._files import open_regular, reason
from ramp_fast.data.files import IMAGE_SUFFIXES, Problem
from ramp_fast.data.images import ImageError
from ramp_fast.data.labels import WORDNET, some, stem_of
from ramp_fast.data.locations import Location, Packed, Part, TableCell, open_table
from ramp_fast.data.records import Record, distinct
from ramp_fast.errors import InputError

__all__ = ["ARCHIVE_SUFFIXES", "archive_records", "is_archive"]

ARCHIVE_SUFFIXES = (".tar", ".zip", ".parquet")

_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

_MAX_LABEL_BYTES = 2**20


@dataclass(frozen=True)
class _Entry:
    """A file within an archive: its name with folders, and where it lies."""

    name: str
    location: Location


def is_archive(path: str) -> bool:
    """Whether a file is named as an archive that can be read.

    Raises
    ------
    InputError
        It is named as a compressed tar, of which no part can be read without all that is before it.
    """
    name = path.lower()
    if name.endswith(_COMPRESSED):
        raise InputError(f"{path}: a compressed tar cannot be read image by image: uncompress it (to .tar) first")
    return name.endswith(ARCHIVE_SUFFIXES)


def archive_records(root: str, paths: Sequence[str], layout: str, problems: list[Problem]) -> tuple[str, list[Record]]:
    """The images of some archives of one kind.

    Parameters
    ----------
    root : str
        Locations are relative to it: the folder of the archives, or the only archive itself.
    paths : sequence of str
        The archives, in order.
    layout : str
        "auto", "flat", "folders", "webdataset" or "parquet".
    problems : list of Problem
        Takes what cannot be used.

    Returns
    -------
    (str, list of Record)
        The layout that was found.
    """
    kinds = sorted({os.path.splitext(path)[1].lower() for path in paths})
    if len(kinds) > 1:
        raise InputError(f"{root}: archives of several kinds ({', '.join(kinds)}): name one kind by its own folder")
    if kinds == [".parquet"]:
        if layout not in ("auto", "parquet"):
            raise InputError(f"{root}: a Parquet file is a table, not {layout}")
        return "parquet", [record for path in paths for record in _parquet(path, _relative(path, root))]
    entries: list[_Entry] = []
    for path in paths:
        found = _zip(path, _relative(path, root)) if kinds == [".zip"] else _tar(path, _relative(path, root))
        top = stem_of(path)
        # A tar of one class, as those within ImageNet's training tar.
        inside = [_Entry(f"{top}/{e.name}" if WORDNET.fullmatch(top) else e.name, e.location) for e in found]
        entries += inside
    images = [e for e in entries if _suffix(e.name) in IMAGE_SUFFIXES]
    if layout == "webdataset" or (layout == "auto" and any(e.name.endswith(".cls") for e in entries)):
        return "webdataset", _webdataset(root, entries, images, problems)
    classes = [os.path.basename(os.path.dirname(e.name)) for e in images]
    several = len(set(classes)) > 1 or bool(classes and WORDNET.fullmatch(classes[0]))
    if layout == "folders" and not all(classes):
        loose = [e.name for e, c in zip(images, classes, strict=True) if not c]
        raise InputError(f"{root}: {len(loose)} images lie at the top, in no class's folder ({some(loose)})")
    labelled = layout == "folders" or (layout == "auto" and several and all(classes))
    names = distinct((os.path.splitext(e.name)[0], e.name) for e in images)
    return ("folders" if labelled else "flat"), [
        Record(name, e.location, group if labelled else None)
        for name, e, group in zip(names, images, classes, strict=True)
    ]


def _relative(path: str, root: str) -> str:
    return "" if path == root else os.path.relpath(path, root)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/")) or name.startswith("__MACOSX/")


class _Window(io.RawIOBase):
    """Part of a file, as a file: a tar within a tar."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _tar(path: str, relative: str) -> list[_Entry]:
    try:
        with open_regular(path) as file:
            return list(_tar_entries(file, 0, relative, ""))
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a tar that can be read: {reason(error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def _tar_entries(file: BinaryIO, start: int, relative: str, above: str) -> Iterator[_Entry]:
    """Files within a tar that begins at ``start`` of the file, and within tars in it."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which tarfile keeps, though nobody asks again
            if not member.isreg() or member.sparse or _hidden(member.name.removeprefix("./")):
                continue
            name, offset = member.name.removeprefix("./"), start + member.offset_data
            if _suffix(name) == ".tar":
                if above:
                    continue  # no data set nests them deeper
                raw = _Window(file, member.offset_data, member.size)
                # Buffered: its headers are read one by one.
                yield from _tar_entries(io.BufferedReader(raw, 512), offset, relative, stem_of(name))
            else:
                yield _Entry(f"{above}/{name}" if above else name, Part(relative, offset, member.size))


def _zip(path: str, relative: str) -> list[_Entry]:
    entries = []
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir() or _hidden(info.filename):
                    continue
                if info.flag_bits & 1:
                    raise InputError(f"{path}: its entries are encrypted: unpack it first")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{path}: {info.filename} is compressed by a method that is not read: unpack it")
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                where = Packed(relative, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
                entries.append(_Entry(info.filename, where))
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: not a zip archive that can be read: {reason(error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    return entries


def _webdataset(
    root: str, entries: Sequence[_Entry], images: Sequence[_Entry], problems: list[Problem]
) -> list[Record]:
    """Samples: files of one name up to the first dot behind the folders, one of which is the image."""
    said: dict[str, _Entry] = {}
    for entry in entries:
        if entry.name.endswith(".cls"):
            said[_key(entry)] = entry
    records = []
    for image, name in zip(images, distinct((_sample(e.name), e.name) for e in images), strict=True):
        if not said:
            records.append(Record(name, image.location))
            continue
        of_class = said.get(_key(image))
        group = None if of_class is None else _class_text(of_class, root)
        if group is None:
            problems.append(Problem(f"{root}: {image.name}", "no class is said of it (.cls)"))
        else:
            records.append(Record(name, image.location, group))
    return records


def _sample(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def _key(entry: _Entry) -> str:
    return f"{entry.location.path}:{_sample(entry.name)}"


def _class_text(entry: _Entry, root: str) -> str | None:
    if (entry.location.size or 0) > _MAX_LABEL_BYTES:
        return None
    try:
        text = entry.location.below(root).read().decode().strip()
    except (OSError, ImageError, UnicodeDecodeError):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return text or None
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _parquet(path: str, relative: str) -> Iterator[Record]:
    """Rows of a table with images as Hugging Face writes them: a struct of bytes and path, or bytes."""
    import pyarrow

    with open_table(path) as table:
        schema = table.schema_arrow
        column = _image_column(schema, path)
        nested = pyarrow.types.is_struct(schema.field(column).type)
        label = next((n for n in ("label", "labels", "fine_label", "cls") if n in schema.names), None)
        wanted = [f"{column}.path"] if nested and schema.field(column).type.get_field_index("path") >= 0 else []
        wanted += [label] if label is not None else []
        rows: list[tuple[str, TableCell, str | None]] = []
        stem = stem_of(path)
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            read = table.read_row_group(group, columns=wanted, use_threads=False).to_pylist() if wanted else []
            for row in range(count):
                found = read[row] if read else {}
                path_of = (found.get(column) or {}).get("path") if nested else None
                value = found.get(label) if label is not None else None
                name = os.path.splitext(path_of)[0] if path_of else f"{stem}/{len(rows):08d}"
                rows.append((name, TableCell(relative, column, group, row), None if value is None else str(value)))
    names = distinct((name, f"{name}@{stem}") for name, _, _ in rows)
    for name, (_, cell, class_) in zip(names, rows, strict=True):
        yield Record(name, cell, class_)


def _image_column(schema: Any, path: str) -> str:
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    preferred = [name for name in ("image", "img", "jpg", "png") if name in found]
    if not found or (len(found) > 1 and not preferred):
        raise InputError(
            f"{path}: {'no column' if not found else f'several columns ({some(found)})'} of image bytes; 'image' is "
            f"what Hugging Face calls it; there are: {some(schema.names, 10)}"
        )
    return str((preferred or found)[0])
