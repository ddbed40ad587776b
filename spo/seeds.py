"""Seeds: one for each use of randomness."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A seed for one use of randomness, from what identifies it: no stage can disturb another's stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
