"""A run in which only the tests skip that are expected to.

A test that skips is not a test that passed. Where the environment variable JAXNORM_SKIPS names a
file, such as tests/skips.txt, its lines are the expected skips, "count reason", and any other skip
fails the run. The count "any" is for what a machine can't run. Without the variable, tests may skip
what is not installed.
"""

import collections
import os
from pathlib import Path

import pytest

VARIABLE = "JAXNORM_SKIPS"


def expected() -> dict[str, int | None]:
    """How many tests may skip for each reason; None is any number."""
    lines = Path(os.environ[VARIABLE]).read_text().splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return {reason: None if count == "any" else int(count) for count, reason in pairs}


def differences(config: pytest.Config) -> dict[str, tuple[int, int]]:
    """For each reason that more or fewer tests skipped for than expected, both numbers."""
    given, wanted = found(config), expected()
    counts = {reason: wanted.get(reason, 0) for reason in sorted(given.keys() | wanted.keys())}
    return {
        reason: (given[reason], count)
        for reason, count in counts.items()
        if count is not None and given[reason] != count
    }


def found(config: pytest.Config) -> collections.Counter:
    """How many tests skipped for each reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def is_checked(config: pytest.Config) -> bool:
    """Whether this process, of those of a parallel run, has all reports and has to check them."""
    return VARIABLE in os.environ and not hasattr(config, "workerinput")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if other tests skipped than are expected to."""
    if is_checked(session.config) and differences(session.config):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which skips were not expected, and which were missing."""
    if not is_checked(config):
        return
    file = os.environ[VARIABLE]
    for reason, (given, wanted) in differences(config).items():
        terminalreporter.write_line(
            f"FAILED: {given} tests skipped where {file} expects {wanted}: {reason}", red=True
        )
