"""From missing neurons to few reads.

Rows that are neighbours on flash become one extent; rows a small gap apart do too, because a device serves one
slightly longer read faster than two ("it is worthwhile to read more than needed, but in larger chunks", §3.2).
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

MAX_EXTENT_ROWS = 512  # the kernel takes at most 1024 buffers in one vectored read


def extents(rows: IntArray, max_gap_rows: int = 0, max_rows: int = MAX_EXTENT_ROWS) -> list[tuple[int, int]]:
    """Merge sorted row numbers into extents.

    Args:
        rows: [n] sorted, unique.
        max_gap_rows: unwanted rows that an extent may bridge between two wanted ones.
        max_rows: longest extent, in rows.

    Returns:
        Half-open ranges of positions in `rows`: extent (i, j) covers rows[i] .. rows[j - 1]. Together they cover
        every position once, in order.
    """
    if len(rows) == 0:
        return []
    cuts = np.flatnonzero(np.diff(rows) > max_gap_rows + 1) + 1
    bounds = [0, *cuts.tolist(), len(rows)]
    out: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(bounds):
        first = start
        while rows[stop - 1] - rows[first] >= max_rows:
            last = int(np.searchsorted(rows, rows[first] + max_rows))
            out.append((first, last))
            first = last
        out.append((first, stop))
    return out
