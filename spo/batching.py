"""Batches of limited size: the one home of every split by length, by tokens or by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
Item = tuple[int, int]
"""Width and size of an item. A batch costs the width of its widest item times the sum of the sizes, in tokens.

A row of a padded batch is ``(length, 1)``; a row of a packed batch, which has no padding, is ``(1, length)``.
"""


def split_by_tokens(
    items: Sequence[Item], *, max_items: int | None = None, max_tokens: int | None = None, min_batches: int = 1
) -> list[slice]:
    """Cut consecutive items into batches, each as large as the limits allow.

    Args:
        items: Items in the order in which they stay.
        max_items: Largest number of items in a batch; ``None`` for no limit.
        max_tokens: Largest cost of a batch in tokens; ``None`` for no limit. An item that costs more by itself is a
            batch of its own.
        min_batches: Number of batches to reach even where the limits need fewer; there must be as many items.

    Returns:
        One slice of ``items`` per batch.
    """
    batches: list[slice] = []
    first = width = total = 0
    for position, (item_width, size) in enumerate(items):
        wider = max(width, item_width)
        full = position - first == max_items or (max_tokens is not None and wider * (total + size) > max_tokens)
        # Each batch that is still missing needs one of the items that are left.
        rest_is_reserved = len(items) - position < min_batches - len(batches)
        if position > first and (full or rest_is_reserved):
            batches.append(slice(first, position))
            first, total, wider = position, 0, item_width
        width = wider
        total += size
    return [*batches, slice(first, len(items))]


def fewest_batches(items: Sequence[Item], max_items: int | None, max_tokens: int | None) -> int:
    """Return the smallest number of batches of consecutive items in which no limit is exceeded.

    Args:
        items: Items, the widest first.
        max_items: Largest number of items in a batch; ``None`` for no limit.
        max_tokens: Largest cost of a batch of several items in tokens; ``None`` for no limit.
    """
    return len(split_by_tokens(items, max_items=max_items, max_tokens=max_tokens))


def even_batches(items: Sequence[Item], count: int, max_items: int | None) -> list[slice]:
    """Cut consecutive items into ``count`` batches whose largest cost is as small as possible.

    Args:
        items: Items, the widest first; at least ``count`` of them.
        count: Number of batches. With at least :func:`fewest_batches`, the limits hold.
        max_items: Largest number of items in a batch, if ``count`` allows it; ``None`` for no limit.
    """
    max_items = max(max_items or len(items), -(-len(items) // count))
    # Binary search for the smallest limit in tokens that `count` batches can meet.
    low, high = 1, items[0][0] * sum(size for _, size in items)
    while low < high:
        middle = (low + high) // 2
        if len(split_by_tokens(items, max_items=max_items, max_tokens=middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return split_by_tokens(items, max_items=max_items, max_tokens=low, min_batches=count)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive parts of at most ``size`` items."""
    return (items[first : first + size] for first in range(0, len(items), size))


def by_length(lengths: Sequence[int], max_items: int) -> list[list[int]]:
    """Return positions in parts of at most ``max_items``, short ones first, which leaves little padding in a part."""
    return [list(part) for part in chunks(sorted(range(len(lengths)), key=lengths.__getitem__), max_items)]


def even_parts_by_length(lengths: Sequence[int], room: int, max_tokens: int) -> list[list[int]]:
    """Return positions by length in the fewest parts of about equal number that fit into ``max_tokens``.

    Args:
        lengths: Length of each row in tokens.
        room: Tokens that each row needs beyond its length.
        max_tokens: Largest cost of a part in tokens, padding and room included; one row may exceed it.
    """
    parts: list[list[int]] = []
    for count in range(1, len(lengths) + 1):
        parts = by_length(lengths, -(-len(lengths) // count))
        if all(len(part) * (lengths[part[-1]] + room) <= max_tokens for part in parts):
            break
    return parts


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Return the number of optimizer steps that see each pair once.

    Args:
        num_pairs: Number of pairs to train on.
        batch_size: Number of pairs per step, over all devices.
    """
    return -(-num_pairs // batch_size)
