"""Seeds, one for each use of randomness."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """Derive the seed of one use of randomness from what identifies it, so that no stage changes another's numbers.

    The values must never change: caches and reruns rely on them.

    Args:
        parts: Name of the use, seed of the run, and whatever else distinguishes it from other uses.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
