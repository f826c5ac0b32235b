"""Files as streams of uncompressed bytes: gzip, zstandard, bzip2, xz, or none.

All four decompressors are driven by hand. Python's own `zstandard` reader ends without a word where a file was cut off;
here a stream that ends inside a frame, or is followed by something else, is an error for each of them.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import zstandard

from affina.errors import DataError, Location

Compression = Literal["gzip", "zstd", "bzip2", "xz"]

SUFFIXES: Final[dict[str, Compression]] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}

_MAGIC: Final[dict[Compression, bytes]] = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
}
_SUFFIX_OF: Final[dict[Compression, str]] = {name: suffix for suffix, name in SUFFIXES.items()}

# Small pieces keep a decompression bomb from filling memory: gzip expands 1032-fold at most.
_INPUT_BYTES: Final = 16 * 1024


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _decompressor_factory(compression: Compression) -> Callable[[], Any]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    if compression == "zstd":
        return lambda: zstandard.ZstdDecompressor().decompressobj()
    if compression == "bzip2":
        return bz2.BZ2Decompressor
    return lzma.LZMADecompressor


_CORRUPT = (zlib.error, zstandard.ZstdError, OSError, lzma.LZMAError, EOFError, ValueError)


def compression_of_name(path: Path) -> Compression | None:
    """The compression that the file's last suffix announces."""
    return SUFFIXES.get(path.suffix.lower())


def compression_of_content(head: bytes) -> Compression | None:
    """The compression whose signature the first bytes carry."""
    for compression, magic in _MAGIC.items():
        if head.startswith(magic):
            return compression
    return None


def open_bytes(path: Path) -> io.BufferedReader:
    """The uncompressed bytes of `path`, as a buffered reader.

    raises: DataError when the file is missing, unreadable, empty, not what its name says, cut off or damaged (the
    last two while reading)
    """
    where = Location(path)
    file = _open_raw(path)
    head = file.read(16)
    if not head:
        file.close()
        raise DataError("empty-file", f"{path.name} is empty", fix="remove it, or write it again", where=where)
    file.seek(0)
    named, found = compression_of_name(path), compression_of_content(head)
    if named != found:
        file.close()
        raise _misnamed(path, named, found)
    if named is None:
        return file
    stream = _DecompressedStream(_decompressed(file, named, where))
    reader: io.BufferedReader = io.BufferedReader(stream, buffer_size=256 * 1024)
    if not reader.peek(1):
        reader.close()
        raise DataError("empty-file", f"{path.name} holds no data", fix="remove it, or write it again", where=where)
    return reader


def _open_raw(path: Path) -> io.BufferedReader:
    where = Location(path)
    try:
        return io.BufferedReader(io.FileIO(path), buffer_size=256 * 1024)
    except PermissionError:
        raise DataError(
            "unreadable-file",
            f"no permission to read {path.name}",
            fix=f"make it readable: chmod u+r {path}",
            where=where,
        ) from None
    except OSError as error:
        raise DataError(
            "unreadable-file",
            f"{path.name} cannot be opened: {error.strerror}",
            fix="check the path and the disk",
            where=where,
        ) from None


def _misnamed(path: Path, named: Compression | None, found: Compression | None) -> DataError:
    if found is None:
        assert named is not None
        fix = f"rename it to {path.stem}, or compress it"
        return DataError("wrong-extension", f"{path.name} is not {named} data", fix=fix, where=Location(path))
    plain = path.stem if named else path.name
    return DataError(
        "wrong-extension",
        f"{path.name} holds {found} data",
        fix=f"rename it to {plain}{_SUFFIX_OF[found]}",
        where=Location(path),
    )


def _decompressed(file: io.BufferedReader, compression: Compression, where: Location) -> Generator[bytes, None, None]:
    """Uncompressed pieces; several frames or members may follow each other."""
    make = _decompressor_factory(compression)
    decoder: _Decompressor = make()
    produced = 0
    started = False
    with file:
        while data := file.read(_INPUT_BYTES):
            while data:
                if decoder.eof:
                    # Zero padding after the last member is legal (tapes, block devices).
                    data = data.lstrip(b"\x00") if started else data
                    if not data:
                        break
                    decoder, started = make(), False
                try:
                    piece = decoder.decompress(data)
                except _CORRUPT as error:
                    raise DataError(
                        "damaged-archive",
                        f"the {compression} data is damaged after {produced:,} uncompressed bytes ({error})",
                        fix="download or write the file again",
                        where=where,
                    ) from None
                started = True
                produced += len(piece)
                data = decoder.unused_data if decoder.eof else b""
                if piece:
                    yield piece
    if not decoder.eof:
        raise DataError(
            "truncated-archive",
            f"the {compression} data ends too early, after {produced:,} uncompressed bytes",
            why="the download or the copy was cut off; the records that are missing cannot be known",
            fix="download or copy the file again",
            where=where,
        )


class _DecompressedStream(io.RawIOBase):
    """Pieces of bytes as a raw stream."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        super().__init__()
        self._pieces = pieces
        self._rest: memoryview = memoryview(b"")

    def close(self) -> None:
        self._pieces.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        # Filled to the brim, so that `peek` on top of it shows as much as it does for a plain file.
        filled = 0
        while filled < len(buffer):
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
            size = min(len(buffer) - filled, len(self._rest))
            buffer[filled : filled + size] = self._rest[:size]
            self._rest = self._rest[size:]
            filled += size
        return filled
