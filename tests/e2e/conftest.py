"""End to end: the real containerd with its own client, and whatever the runtime starts below it.

The fixtures form a ladder: `containerd` (one daemon for all tests), `events` (its recorder), `shared` (one
container that runs all the time, for whatever needs no container of its own: booting is what costs time).

Pods start from a template, which is made once for all tests. With `vm_any` a test runs with VMs that boot and
again with those of the template: for what starts or ends a VM, and for what a VM tells when it dies. If it is
marked `from_cache`, it runs a third time, with a VM that waited for it; one VM waits, so it starts one pod.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.harness import leaks, runtimes
from tests.harness.cache import Cache
from tests.harness.containerd import Containerd
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.runtimes import Runtime, Start

HERE = Path(__file__).parent
LOG_LIMIT = 12_000  # bytes of log that a failure shows
TOLD = {  # where a VM comes from, in the log
    Start.TEMPLATE: r"VM ([0-9a-f]{16}) goes on from template",
    Start.CACHE: r"VM ([0-9a-f]{16}) was VM [0-9a-f]{16} of the cache",
}

log_key = pytest.StashKey[tuple[Containerd, int]]()


class MakeContainerd(Protocol):
    """Makes a containerd beside the one that all tests share."""

    def __call__(self, *, programs: Path | None = None, start: Start = Start.TEMPLATE) -> Containerd: ...


class NoLeaks(Protocol):
    """Makes a block after which the host must be as it was before."""

    def __call__(self) -> AbstractContextManager[None]: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def template_path() -> Iterator[Path]:
    """Where the templates of all tests are: none at first, and gone in the end."""
    with tempfile.TemporaryDirectory(prefix="kata-templates-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def make_containerd(template_path: Path) -> MakeContainerd:
    if os.geteuid() != 0:
        pytest.skip("needs root: containerd and its shims mount")
    missing = [name for name in ("containerd", "ctr") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    chosen = os.environ.get("KATA_E2E_RUNTIME", "kata")

    def make(*, programs: Path | None = None, start: Start = Start.TEMPLATE) -> Containerd:
        def runtime(directory: Path) -> Runtime:
            if chosen == "runc":
                return runtimes.runc()
            made = runtimes.kata(directory, template_path=template_path)
            made.start_from(start)
            if start is Start.TEMPLATE and not any(template_path.iterdir()):
                assert made.factory("init") == "vm factory initialized\n"
            return made

        return Containerd(runtime, programs=programs)

    return make


@pytest.fixture(scope="session")
def containerd(make_containerd: MakeContainerd) -> Iterator[Containerd]:
    with make_containerd() as daemon:
        yield daemon


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vm_any" not in metafunc.fixturenames:
        return
    starts = [Start.DIRECT, Start.TEMPLATE]
    collected_again = metafunc.function.__module__ != metafunc.module.__name__
    if metafunc.definition.get_closest_marker("from_cache") and not collected_again:
        starts.append(Start.CACHE)
    metafunc.parametrize("vm_any", starts, indirect=True, ids=[start.value for start in starts])


@pytest.fixture(scope="module")
def vm_cache(containerd: Containerd) -> Iterator[Cache]:
    """A server that keeps one VM ready, until the end of the module: then the host is for others alone."""
    cache = Cache(containerd)
    containerd.runtime.start_from(Start.CACHE)
    try:
        with cache.server(1):
            containerd.runtime.start_from(Start.TEMPLATE)
            yield cache
    finally:
        containerd.runtime.start_from(Start.TEMPLATE)


@pytest.fixture
def vm_any(request: pytest.FixtureRequest, containerd: Containerd) -> Iterator[Start]:
    """Start the pods of a test in one of all ways, and see that they did."""
    start: Start = request.param
    if not containerd.runtime.is_vm:
        if start is not Start.DIRECT:
            pytest.skip(f"{containerd.runtime.name} has no VM")
        yield start
        return
    if start is Start.CACHE:
        request.getfixturevalue("vm_cache").wait_ready()
    offset = containerd.log_size()
    containerd.runtime.start_from(start)
    try:
        yield start
    finally:
        containerd.runtime.start_from(Start.TEMPLATE)
    log = containerd.log_since(offset, limit=containerd.log_size())
    every = set(re.findall(r"VM ([0-9a-f]{16}) serves", log))
    assert every or start is not Start.CACHE, "no pod was started"
    for way, told in TOLD.items():
        assert set(re.findall(told, log)) == (every if way is start else set())


@pytest.fixture
def vm_runtime(containerd: Containerd) -> Runtime:
    """The runtime, for tests of what only a runtime with VMs has."""
    if not containerd.runtime.is_vm:
        pytest.skip(f"{containerd.runtime.name} has no VM")
    return containerd.runtime


@pytest.fixture(scope="session")
def events(containerd: Containerd) -> Iterator[Recorder]:
    with Recorder(containerd) as recorder:
        yield recorder


@pytest.fixture(scope="session")
def shared(containerd: Containerd) -> Iterator[str]:
    with containerd.running() as container:
        yield container


@pytest.fixture
def no_leaks(containerd: Containerd) -> NoLeaks:
    @contextmanager
    def block() -> Iterator[None]:
        before = leaks.snapshot(containerd)
        yield
        left = leaks.left_over(containerd, before)
        assert not left, "left behind:\n" + "\n".join(left)

    return block


@pytest.fixture
def fault(containerd: Containerd, request: pytest.FixtureRequest) -> Fault:
    """The fault that the test is about, under the test's name."""
    return Fault(containerd, request.node.name)


@pytest.fixture(autouse=True)
def _log_position(request: pytest.FixtureRequest) -> None:
    """Remember where the log stood, so that a failure shows what containerd and the shims said since."""
    if "containerd" in request.fixturenames:
        daemon: Containerd = request.getfixturevalue("containerd")
        request.node.stash[log_key] = (daemon, daemon.log_size())


@pytest.fixture(autouse=True)
def _nothing_is_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """Look after each test for what belongs to no live sandbox, with the operator's own tool."""
    yield
    if "containerd" in request.fixturenames:
        left = leaks.forgotten(request.getfixturevalue("containerd"))
        assert not left, "left behind:\n" + "\n".join(left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and log_key in item.stash:
        daemon, offset = item.stash[log_key]
        report.sections.append(("log of containerd and the shims", daemon.log_since(offset, LOG_LIMIT)))
    return report
