"""Zip archives of which every byte is known: what is released in them is their files, and nothing else.

A zip can say more than its files: time stamps, comments, extra fields, permissions, bytes between the entries, entries
of the same name. Here an archive is a function of names and contents: entries in the order of their names, stored and
not compressed, dated 1980. So a reader can pack again what it found, and compare.

>>> content = pack({"b.txt": b"2", "a.txt": b"1"})
>>> unpack(content)
({'a.txt': b'1', 'b.txt': b'2'}, ())
>>> unpack(content + b"P.S.")[1]
('bytes that belong to no file (before, between or behind the entries)',)

Formal guarantee:
    ``unpack`` finds no fault only in archives that ``pack`` makes of the files returned. It writes no file, inflates
    nothing and runs nothing.
"""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd")
_MODE = 0o644


def pack(files: Mapping[str, bytes]) -> bytes:
    """The archive of these files.

    Args:
        files: content by name, such as ``folder/file.json``.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, FIRST_DATE)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | _MODE) << 16
            archive.writestr(entry, files[name])
    return stream.getvalue()


def unpack(content: bytes, may_nest: str = "") -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of an archive, and everything about it that ``pack`` would not have written.

    Args:
        content: of the archive.
        may_nest: ending of the files that are archives by their format (checkpoints).

    Returns:
        Contents by name, those that can be read safely; and faults, in words.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            faults = ["a comment of the archive"] if archive.comment else []
            files: dict[str, bytes] = {}
            for entry in archive.infolist():
                found = list(_faults(entry))
                found += ["has a name that an earlier entry has: duplicate"] if entry.filename in files else []
                readable = not entry.flag_bits & 0x1 and entry.compress_type == zipfile.ZIP_STORED
                data = archive.read(entry) if readable and not entry.is_dir() else b""
                if _is_archive(data) and not (may_nest and entry.filename.endswith(may_nest)):
                    found.append("is an archive in the archive")
                faults += [f"{entry.filename} {fault}" for fault in found]
                files.setdefault(entry.filename, data)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        return {}, (f"no zip archive that can be read ({type(error).__name__})",)
    if not faults and pack(files) != content:
        faults.append("bytes that belong to no file (before, between or behind the entries)")
    return files, tuple(faults)


def _faults(entry: zipfile.ZipInfo) -> Iterator[str]:
    if not _is_safe(entry.filename):
        yield "has a name that leaves the folder it is unpacked in (path traversal)"
    if entry.is_dir():
        yield "is a folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        yield "is a symbolic link"
    elif kind not in (0, stat.S_IFREG):
        yield "is no regular file"
    if entry.flag_bits & 0x1:
        yield "is encrypted"
    if entry.date_time != FIRST_DATE:
        yield "has a time stamp"
    if entry.comment:
        yield "has a comment"
    if entry.extra:
        yield "has an extra field"
    if entry.compress_type != zipfile.ZIP_STORED:
        yield "is compressed, so that nobody looked inside"


def _is_safe(name: str) -> bool:
    """Whether a name stays below the folder it is unpacked in, on every system."""
    plain = name.isascii() and name.isprintable() and not set(name) & set('\\:*?"<>|')
    parts = name.rstrip("/").split("/")
    return plain and not PurePosixPath(name).is_absolute() and not {"", ".", ".."} & set(parts)


def _is_archive(data: bytes) -> bool:
    return data.startswith(_ARCHIVES) or data[257:262] == b"ustar"
