"""Numbers to hold a model's losses against.

Rule: each function states its definition, what it divides by, and what it does with nothing.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib -9": lambda data: zlib.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_XZ),
}


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """Bits per UTF-8 byte that general compressors need for `texts`, by compressor.

    `each_alone` compresses every text by itself and divides the summed sizes; `together` compresses them in order as
    one stream, so that a later text can refer to an earlier one. Headers count. zlib at level 9 (RFC 1950), lzma as an
    .xz file with Python's default preset. Neither has seen any training text.

    Raises: ValueError if there is no byte.
    """
    encoded = [text.encode() for text in texts]
    num_bytes = sum(map(len, encoded))
    if not num_bytes:
        raise ValueError("no bytes to compress")
    whole = b"".join(encoded)
    return {
        name: {
            "each_alone": 8 * sum(len(compress(data)) for data in encoded) / num_bytes,
            "together": 8 * len(compress(whole)) / num_bytes,
        }
        for name, compress in COMPRESSORS.items()
    }
