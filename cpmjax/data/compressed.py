"""gzip and zstandard: streams that raise EOFError where the data stop before their end, and OSError for damage."""

from __future__ import annotations

import gzip
import io
from typing import Any, BinaryIO, cast

from cpmjax.data.optional import optional

FORMATS = {".gz": "gzip", ".zst": "zstandard"}

_BLOCK = 1 << 16  # packed bytes in one go; of a text of nothing but zeros they may become 10,000 times as many


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """What a file holds whose name ends in .gz or .zst; any other one as it is."""
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if name.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_Zstandard(stream, optional("zstandard", name)), _BLOCK))
    return stream


class _Zstandard(io.RawIOBase):
    """One frame after the other. The package's own stream_reader ends without a word where a frame is cut short."""

    def __init__(self, stream: BinaryIO, zstandard: Any) -> None:
        # 2 GiB is what `zstd --long=31` needs, with which some large corpora are packed.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._stream = stream
        self._frame: Any = None  # None: between two frames
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._packed or self._stream.read(_BLOCK)
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._unpack(packed)
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self, packed: bytes) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(packed))
        except self._error as error:
            raise OSError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
