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
    parts = [str(part).encode() for part in (seed, *names)]
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
