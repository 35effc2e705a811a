"""The tests that are run of a grid have every pair of its values."""

import itertools

import pairs

GRID = list(itertools.product((("a", i) for i in range(3)), (("b", i) for i in range(5)), "cd"))


def test_every_pair_is_there():
    every = {pair for test in GRID for pair in itertools.combinations(test, 2)}
    chosen = [GRID[place] for place in pairs.covering(GRID)]
    assert {pair for test in chosen for pair in itertools.combinations(test, 2)} == every
    assert len(chosen) < len(GRID) * 2 / 3


def test_where_there_are_no_pairs_all_are_run():
    assert pairs.covering([(), ()]) == [0]  # one test, named twice
    assert pairs.covering([(("a", 0),), (("a", 1),)]) == [0, 1]
    assert pairs.covering(list(itertools.product("ab", "cd"))) == [0, 1, 2, 3]
