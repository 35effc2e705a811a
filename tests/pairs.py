"""Of a grid of parameters, the tests that have every value, or every pair of values.

Most errors depend on one or two parameters of a call (Kuhn, Wallace and Gallo, "Software Fault
Interactions and Implications for Software Testing", 2004). By default each value of each parameter
is in one of the tests that are run; with `--pairs`, as in `.ci/run`, each pair of values is. Tests
that are marked as thorough take long, and where they fail others mostly do: they need `--pairs`.
`--all` runs all; so does naming a test by its "::".
"""

import itertools
from collections.abc import Hashable, Iterable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--pairs` and `--all`."""
    parser.addoption("--pairs", action="store_true", help="every pair of values of parameters")
    parser.addoption("--all", action="store_true", help="every test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests whose values, or pairs of values, others have."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    pairs = bool(config.getoption("--pairs"))
    left_out = {item for item in items if not pairs and item.get_closest_marker("thorough")}
    grids: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        if item not in left_out:
            grids.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for grid in grids.values():
        axes = [_values(item) for item in grid]
        left_out.update(set(grid) - {grid[place] for place in covering(axes, 1 + pairs)})
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def covering(tests: Iterable[tuple[Hashable, ...]], size: int) -> list[int]:
    """The places of tests that together have all values, or pairs, that any of them has.

    In each step the first test is taken that has the most which are missing.

    Args:
      tests: the values of each.
      size: 1 for values, 2 for pairs.
    """
    missing = {
        place: set(itertools.combinations(values, size)) or {values}
        for place, values in enumerate(tests)
    }
    chosen = []
    while missing:
        best = max(missing, key=lambda place: len(missing[place]))
        found = missing.pop(best)
        chosen.append(best)
        missing = {place: sets - found for place, sets in missing.items() if sets - found}
    return sorted(chosen)


def _values(item: pytest.Item) -> tuple[tuple[str, int], ...]:
    """Names and identities of the parameters; the tests of a grid share the objects."""
    callspec = getattr(item, "callspec", None)
    return tuple((name, id(value)) for name, value in callspec.params.items()) if callspec else ()
