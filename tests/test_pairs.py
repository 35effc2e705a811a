"""The tests chosen from a grid have every value, or every pair of values."""

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


GRIDS = """
import pytest


@pytest.mark.parametrize("a", [1, 2.0, "three", (4,)])
@pytest.mark.parametrize(("b", "c"), [(x, y) for x in "de" for y in (5, None)])
def test_both(a, b, c):
    pass
"""


@pytest.mark.parametrize("flags", [(), ("--pairs",)])
def test_a_file_has_the_same_tests_alone_and_with_others(pytester, flags):
    files = [str(pytester.makepyfile(**{name: GRIDS})) for name in ("test_one", "test_two")]

    def chosen(*names):
        run = pytester.inline_run("--collect-only", "-p", "pairs", *flags, *names)
        items = run.getcalls("pytest_collection_finish")[0].session.items
        return [item.nodeid for item in items if item.path.name == "test_two.py"]

    alone = chosen(files[1])
    assert 0 < len(alone) < 16
    assert alone == chosen(*files) == chosen(*reversed(files))
