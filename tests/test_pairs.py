"""The tests that are run of a grid have every value, or every pair of its values."""

import itertools

import pairs
import pytest

GRID = list(itertools.product((("a", i) for i in range(3)), (("b", i) for i in range(5)), "cd"))


@pytest.mark.parametrize(("size", "least"), [(1, 5), (2, 15)])
def test_every_pair_is_there(size, least):
    every = {part for test in GRID for part in itertools.combinations(test, size)}
    chosen = [GRID[place] for place in pairs.covering(GRID, size)]
    assert {part for test in chosen for part in itertools.combinations(test, size)} == every
    assert least <= len(chosen) < len(GRID) * 2 / 3


def test_where_there_are_no_pairs_all_are_run():
    assert pairs.covering([(), ()], 2) == [0]  # one test, named twice
    assert pairs.covering([(("a", 0),), (("a", 1),)], 2) == [0, 1]
    assert pairs.covering(list(itertools.product("ab", "cd")), 2) == [0, 1, 2, 3]
