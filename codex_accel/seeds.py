"""One seed in the config, and every random draw named after it.

Rule: a draw depends on the seed and on what it is for (such as "dropout", step, micro-batch), never on how many draws
came before or on which process makes it; so no generator state has to be saved to resume exactly.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose `names`: the head of SHA-256 over the parts, each with its length.

    >>> derive(0, "dropout", 7, 1) == derive(0, "dropout", 7, 1) != derive(0, "dropout", 71)
    True
    """
    return int.from_bytes(hashlib.sha256(encoded(seed, *names)).digest()[:8], "big") >> 1


def encoded(*parts: str | int) -> bytes:
    """The bytes that stand for `parts`: each with its length, so that no two sequences are alike."""
    texts = [str(part).encode() for part in parts]
    return b"".join(len(text).to_bytes(4, "big") + text for text in texts)
