"""Extents cover what is missing, once and in order, in as few reads as the gaps allow."""

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from hf_flash.plan import MAX_EXTENT_ROWS, extents

ROWS = st.sets(st.integers(0, 5000) | st.integers(0, 60), max_size=300).map(lambda s: np.array(sorted(s), np.int64))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 20), st.integers(1, 50))
def test_extents_cover_every_position_once_within_gap_and_length(rows: np.ndarray, gap: int, longest: int) -> None:
    found = extents(rows, gap, longest)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(len(rows)))
    for start, stop in found:
        assert start < stop
        assert rows[stop - 1] - rows[start] < longest
        assert (np.diff(rows[start:stop]) <= gap + 1).all()
    for (start, stop), (_, next_stop) in itertools.pairwise(found):
        too_far = rows[stop] - rows[stop - 1] > gap + 1
        too_long = rows[stop] - rows[start] >= longest
        assert too_far or too_long, f"extents {start}:{stop} and {stop}:{next_stop} could be one"


def test_no_rows_no_extents() -> None:
    assert extents(np.empty(0, np.int64)) == []


def test_a_whole_layer_is_cut_to_what_one_vectored_read_takes() -> None:
    found = extents(np.arange(2000))
    assert [stop - start for start, stop in found] == [512, 512, 512, 464]
    assert 2 * MAX_EXTENT_ROWS <= 1024  # a gap may lie before each row
