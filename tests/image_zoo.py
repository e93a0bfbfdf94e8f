"""Image files byte by byte, for what Pillow itself does not write."""

import struct
import zlib

import numpy as np


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, data: bytes) -> bytes:
    """An RGB PNG of any size; `data` is its compressed content."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, part) for kind, part in parts)


def deep_png(width: int, height: int) -> bytes:
    """16 bits a band, as reflectances are: 200 to 3000."""
    line = b"\0" + np.linspace(200, 3000, 3 * width).astype(">u2").tobytes()
    return png(width, height, 16, zlib.compress(line * height))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose few bytes decode to width x height black pixels."""
    packer, line = zlib.compressobj(9), bytes(1 + 3 * width)
    return png(width, height, 8, b"".join(packer.compress(line) for _ in range(height)) + packer.flush())


def tiff(width: int, height: int, bits: int, bands: int = 3, data: bytes | None = None) -> bytes:
    """An uncompressed TIFF in one strip; zeros unless `data` is given (b"" for none at all)."""
    data = bytes(width * height * bands * bits // 8) if data is None else data
    extra = struct.pack(f"<{bands}H", *[bits] * bands)
    at_extra = 8 + 2 + 12 * 8 + 4
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, bands, at_extra),
        (259, 4, 1, 1),
        (262, 4, 1, 2),
        (273, 4, 1, at_extra + len(extra)),
        (277, 4, 1, bands),
        (279, 4, 1, max(1, len(data))),
    ]
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4) + extra + data
