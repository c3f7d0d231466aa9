"""What all tests share: what they need of the machine, and what happens when it is not there.

A test that cannot run for want of something is skipped with a sentence that says what is missing. With
KATA_REQUIRE_ALL=1 (as in CI, where everything is there) such a skip is a failure: otherwise a broken set-up
would look like success. Only what nobody can promise (NotToBeHad) may still be missing.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.agent import RunningAgent, make_rootfs, missing, running_agent
from tests.skips import NotToBeHad

# How long an example takes says something about the machine: a busy one is no failure.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

REQUIRE_ALL = os.environ.get("KATA_REQUIRE_ALL") == "1"


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system for containers of the real agent."""
    return make_rootfs(tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture(scope="module")
def agent() -> Iterator[RunningAgent]:
    """The real agent, without a VM; one for a file of tests."""
    if lacking := missing():
        pytest.skip(f"the real agent needs {lacking}")
    with running_agent() as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected = hasattr(report, "wasxfail") or (
        call.excinfo is not None and isinstance(call.excinfo.value, NotToBeHad)
    )
    if REQUIRE_ALL and report.skipped and not expected:
        report.outcome = "failed"
        report.longrepr = f"skipped although KATA_REQUIRE_ALL=1: {report.longreprtext}"
    return report
