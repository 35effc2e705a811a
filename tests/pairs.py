"""Of a grid of parameters, the tests that have every pair of values.

Most errors depend on one or two parameters of a call (Kuhn, Wallace and Gallo, "Software Fault
Interactions and Implications for Software Testing", 2004). A grid of three or more axes has many
tests for each pair of values, and one of them is run. `--all` runs all; so does naming a test by
its "::".
"""

import itertools
from collections.abc import Hashable, Iterable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all`."""
    parser.addoption("--all", action="store_true", help="every test, not every pair of parameters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests whose pairs others have."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    grids: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        grids.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    left_out = set()
    for grid in grids.values():
        axes = [_values(item) for item in grid]
        left_out.update(set(grid) - {grid[place] for place in covering(axes)})
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def covering(tests: Iterable[tuple[Hashable, ...]]) -> list[int]:
    """The places of tests that together have all pairs of values that any of them has.

    In each step the first test is taken that has the most pairs which are missing.
    """
    missing = {
        place: set(itertools.combinations(values, 2)) or {values}
        for place, values in enumerate(tests)
    }
    chosen = []
    while missing:
        best = max(missing, key=lambda place: len(missing[place]))
        found = missing.pop(best)
        chosen.append(best)
        missing = {place: pairs - found for place, pairs in missing.items() if pairs - found}
    return sorted(chosen)


def _values(item: pytest.Item) -> tuple[tuple[str, int], ...]:
    """Names and identities of the parameters; the tests of a grid share the objects."""
    callspec = getattr(item, "callspec", None)
    return tuple((name, id(value)) for name, value in callspec.params.items()) if callspec else ()
