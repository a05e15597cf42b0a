"""Stripes: decides which to take of whom, and when to go to the upstream instead."""

from __future__ import annotations

MIB = 1024 * 1024
LARGEST = 16 * MIB
#: Smaller blobs have so many stripes that there are enough of them to share.
ENOUGH = 16


def stripe_size(size: int) -> int:
    """How long the stripes of a blob of `size` bytes are; the last one may be shorter."""
    return min(LARGEST, max(1, -(-size // (ENOUGH * MIB))) * MIB)


def stripe_count(size: int) -> int:
    """How many stripes a blob of `size` bytes has; an empty one has one, of no bytes."""
    return max(1, -(-size // stripe_size(size)))
