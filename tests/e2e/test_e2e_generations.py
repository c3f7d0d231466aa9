"""The containerds that users have: a chosen part of the end-to-end tests on 1.7 and on 2.x.

The other files run on the containerd of this machine. Here their tests run again, with this file's fixtures,
on those that scripts/fetch_containerd unpacked; what differs between the generations has tests of its own.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.cri_sandbox_pb2 import PodSandboxConfig
from protos.containerd.runtimeoptions_pb2 import Options
from tests.e2e.conftest import MakeContainerd, NoLeaks

# Collected again under this file's name, and with its `containerd`, `events` and `shared`.
from tests.e2e.test_e2e_crashes import (  # noqa: F401
    forget_fifos,
    shim_of,
    test_a_shim_that_is_killed_takes_everything_with_it,
    test_an_exit_while_the_daemon_is_away_is_known_afterwards,
    test_containers_outlive_the_daemon,
)
from tests.e2e.test_e2e_ctr import (  # noqa: F401
    dressed,
    test_a_checkpoint_has_the_files_of_a_container_that_goes_on,
    test_a_container_without_a_task_is_listed_and_deleted,
    test_a_detached_exec_outlives_its_client_and_is_deleted_by_its_id,
    test_checkpoints_are_refused_in_words_and_end_nothing,
    test_the_client_is_told_of_a_container_what_it_was_created_with,
    test_the_flags_of_an_exec,
    test_the_output_of_a_started_task_is_in_its_log,
    test_the_pid_file_holds_what_the_lists_say,
)
from tests.e2e.test_e2e_exec import (  # noqa: F401
    test_a_missing_program_is_an_error_and_not_a_hang,
    test_a_signal_from_outside_reaches_the_exec_alone,
    test_an_exec_id_that_is_in_use_is_refused,
    test_events_of_an_exec_lie_between_those_of_its_container,
)
from tests.e2e.test_e2e_fault_states import HUNG, QEMU_KILLED, Blow, check_death, exec_open
from tests.e2e.test_e2e_faults_daemon import (  # noqa: F401
    daemon_with_far_events,
    events_socket,
    short,
    test_a_daemon_that_dies_in_the_middle_of_a_create_leaves_nothing,
    test_exits_and_events_outlive_a_daemon_that_is_killed,
)
from tests.e2e.test_e2e_groups import (  # noqa: F401
    group,
    test_the_containers_of_a_group_share_one_shim_and_one_machine,
)
from tests.e2e.test_e2e_run import (  # noqa: F401
    test_a_killed_container_has_the_exit_status_of_the_signal,
    test_a_program_that_does_not_exist_is_an_error_and_leaves_nothing,
    test_detached_and_deleted_later,
    test_stdin_reaches_the_container_and_its_end_too,
)
from tests.e2e.test_e2e_tasks import (  # noqa: F401
    test_a_paused_container_stands_still,
    test_a_running_task_is_not_deleted_without_force,
    test_metrics_are_those_of_the_container,
    test_pids_are_those_of_live_processes_of_the_host,
    ticking,
)
from tests.harness import leaks, sandboxes
from tests.harness.containerd import Containerd, HarnessError
from tests.harness.events import Recorder
from tests.harness.faults import Fault
from tests.harness.leaks import shim_socket
from tests.harness.prelude import Prelude
from tests.harness.processes import kill
from tests.harness.relay import Relay
from tests.harness.runtimes import Runtime, Start, build, set_factory
from tests.harness.sandboxes import Sandbox
from tests.skips import NotToBeHad


@dataclass(frozen=True, slots=True)
class Generation:
    """Those containerds that a suite of Debian stands for."""

    suite: str
    first: tuple[int, ...]  # the lowest version that counts
    moves: (
        bool  # the suite changes from day to day: that it cannot be had, or not run here, is nobody's fault
    )

    @property
    def programs(self) -> Path:
        return build() / "containerd" / self.suite / "usr" / "bin"

    def skip(self, why: str) -> None:
        text = f"no containerd of Debian's {self.suite} to test with: {why}"
        if self.moves:
            raise NotToBeHad(text)
        pytest.skip(text)


GENERATIONS = [
    pytest.param(Generation("trixie", (1, 7), moves=False), id="1.7"),
    pytest.param(Generation("sid", (2, 0), moves=True), id="2"),
]


@pytest.fixture(scope="module", params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> Generation:
    chosen: Generation = request.param
    if not (chosen.programs / "containerd").exists():
        chosen.skip(f"run scripts/fetch_containerd {chosen.suite}; if it cannot fetch it, it says why")
    return chosen


@pytest.fixture(scope="module")
def programs(generation: Generation) -> Path:
    return generation.programs


@pytest.fixture(scope="module")
def make_containerd(make_containerd: MakeContainerd, generation: Generation) -> MakeContainerd:
    """As everywhere, but with the generation's programs."""
    return partial(make_containerd, programs=generation.programs)


@pytest.fixture(scope="module")
def containerd(make_containerd: MakeContainerd, generation: Generation) -> Iterator[Containerd]:
    daemon = make_containerd()
    try:
        try:
            daemon.open()
        except HarnessError as exc:
            generation.skip(f"it does not start here: {exc}")
        if daemon.version() < generation.first:
            generation.skip(f"it is {daemon.version()}")
        daemon.import_image()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(autouse=True)
def _starts(containerd: Containerd) -> None:
    """Whatever daemon a test makes for itself: it is judged only if this generation starts here."""


@pytest.fixture(scope="module")
def events(containerd: Containerd) -> Iterator[Recorder]:
    with Recorder(containerd) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def shared(containerd: Containerd) -> Iterator[str]:
    with containerd.running() as container:
        yield container


def bundle_of(containerd: Containerd, container: str) -> Path:
    task = "io.containerd.runtime.v2.task"  # containerd: the plugin's id names its directory
    return containerd.directory / "state" / task / containerd.namespace / container


def test_the_daemon_finds_the_shim_where_each_generation_looks(
    containerd: Containerd, vm_runtime: Runtime, shared: str
) -> None:
    """1.7 reads `address`, which the shim writes; 2.x notes for itself what `start` printed."""
    bundle = bundle_of(containerd, shared)
    address = (bundle / "address").read_text()
    assert address.startswith("unix:///")
    parameters = bundle / "bootstrap.json"
    assert parameters.exists() == (containerd.version() >= (2, 0))
    if parameters.exists():
        # A plain address stands for version 2: the only one that every daemon takes.
        assert json.loads(parameters.read_text()) == {"version": 2, "address": address, "protocol": "ttrpc"}


def test_what_the_runtime_says_of_itself_reaches_the_client(
    containerd: Containerd, vm_runtime: Runtime, tmp_path: Path
) -> None:
    """Only 2.x asks; for 1.7 the program is run as 2.x would run it."""
    if containerd.version() >= (2, 0):
        arguments = ["--runtime", vm_runtime.name, "--runtime-config-path", str(tmp_path / "options.toml")]
        said = containerd.ctr("plugins", "inspect-runtime", *arguments).stdout
        described = json.loads(said)
        assert described["Name"] == vm_runtime.name
        assert "mount" in described["Features"]["linux"]["namespaces"], described
        assert described["Options"]["config_path"] == str(tmp_path / "options.toml")
    else:
        done = subprocess.run(
            ["containerd-shim-kata-v2", "-info"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=containerd.environ,
            check=True,
        )
        assert vm_runtime.name.encode() in done.stdout
        assert done.stderr == b""


def test_the_runtime_options_name_the_configuration(
    containerd: Containerd, vm_runtime: Runtime, no_leaks: NoLeaks
) -> None:
    config = containerd.directory / "other.toml"
    text = vm_runtime.config.read_text()
    config.write_text(re.sub(r"(?m)^default_memory *=.*$", "default_memory = 768", text))
    set_factory(config, enable_template=False)  # or one would be made for this machine
    with no_leaks():
        flags = ["--runtime-config-path", str(config)]
        told = containerd.run("cat", "/proc/meminfo", flags=flags)
        total = re.search(rb"MemTotal: *([0-9]+) kB", told.stdout)
        assert total is not None, told
        assert 600 << 10 < int(total[1]) < 768 << 10
        missing = containerd.directory / "no-such.toml"
        refused = containerd.run("true", flags=["--runtime-config-path", str(missing)])
        assert refused.exit_status != 0
        assert str(missing).encode() in refused.stderr, refused


def test_what_the_flags_that_came_after_1_6_are_in_the_container(containerd: Containerd) -> None:
    """A set of processors names the host's and is the VM's own business; runc has it where the host can."""
    flags = ["--hostname", "of-the-flag", "--user", "1000:10", "--privileged"]
    flags += ["--privileged-without-host-devices"]
    if containerd.version() >= (2, 0):
        flags += ["--cpuset-cpus", "0", "--cpuset-mems", "0", "--sync-fs"]
    result = containerd.run("sh", "-c", "hostname; id -u; id -g; ls /dev/fuse /dev/kvm", flags=flags)
    assert result.stdout == b"of-the-flag\n1000\n10\n", result


def test_a_user_namespace_is_refused_in_words(
    containerd: Containerd, vm_runtime: Runtime, no_leaks: NoLeaks
) -> None:
    """From 2.0 on the mapping is in the root's mounts as well, which the kernel refused without a word."""
    flags = ["--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000", "--remap-labels"]
    with no_leaks():
        result = containerd.run("true", flags=flags)
    assert result.exit_status != 0
    assert b"run the container without a user namespace" in result.stderr, result


@pytest.mark.from_cache
def test_forced_deletion_ends_what_runs_and_leaves_nothing(
    containerd: Containerd, vm_any: Start, events: Recorder, no_leaks: NoLeaks
) -> None:
    with no_leaks():
        container = containerd.new_id()
        containerd.ctr(*containerd.run_arguments("sleep", "1000", container=container, flags=["--detach"]))
        assert containerd.delete_task(container, "--force") == 137
        containerd.ctr("container", "rm", container)
    events.wait_for(container, "delete")
    assert events.topics(container) == ["create", "start", "exit", "delete"]


@pytest.fixture
def relayed(make_containerd: MakeContainerd, generation: Generation) -> Iterator[tuple[Containerd, Relay]]:
    """A daemon that is told version 3 of the Task service by the shim's `start`, and what it calls."""
    with tempfile.TemporaryDirectory(prefix="kata-v3-") as directory:  # short, for a socket
        prelude = Prelude(Path(directory, "programs"))
        for program in generation.programs.iterdir():
            (prelude.directory / program.name).symlink_to(program)
        with make_containerd(programs=prelude.directory) as daemon:
            container = daemon.new_id()
            relay = Relay(Path(directory, "s"), shim_socket(daemon, container))
            answer = json.dumps({"version": 3, "address": f"unix://{directory}/s", "protocol": "ttrpc"})
            prelude.line(f'{prelude.shim} "$@" >/dev/null && printf %s {shlex.quote(answer)}; exit')
            with relay:
                yield daemon, relay


@pytest.mark.parametrize("generation", [GENERATIONS[1]], indirect=True)
def test_version_3_of_the_task_service_is_spoken_to_a_daemon_that_asks_for_it(
    relayed: tuple[Containerd, Relay],
) -> None:
    """Ours tells version 2, which every daemon takes; a client of the library may tell 3."""
    daemon, relay = relayed
    container = daemon.ids[-1]
    daemon.ctr(*daemon.run_arguments("sleep", "1000", container=container, flags=["--detach"]))
    assert json.loads((bundle_of(daemon, container) / "bootstrap.json").read_text())["version"] == 3
    result = daemon.exec(container, "sh", "-c", "echo out; exit 3", flags=["--exec-id", "one"])
    assert (result.stdout, result.exit_status) == (b"out\n", 3)
    daemon.ctr("task", "pause", container)
    daemon.ctr("task", "resume", container)
    assert daemon.delete_task(container, "--force") == 137
    daemon.ctr("container", "rm", container)
    assert set(relay.calls) == {"containerd.task.v3.Task"}


# Sandboxes that a client makes before there is a container. runc's shim has none to compare with.

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"
SLEEP = ("sh", "-c", "trap 'exit 143' TERM; while :; do sleep 1000 & wait $!; done")


@pytest.fixture
def sandbox(containerd: Containerd, vm_runtime: Runtime, no_leaks: NoLeaks) -> Iterator[Sandbox]:
    with no_leaks(), sandboxes.sandbox(containerd) as made:
        yield made


def start_in(sandbox: Sandbox) -> str:
    """Start a container in the sandbox, which the caller removes."""
    daemon, container = sandbox.containerd, sandbox.containerd.new_id("in")
    flags = ["--detach", "--sandbox", sandbox.id]
    daemon.ctr(*daemon.run_arguments(*SLEEP, container=container, flags=flags))
    return container


def pod_config(hostname: str) -> AnyMessage:
    config = PodSandboxConfig(hostname=hostname)
    config.dns_config.servers.append("192.0.2.53")
    return AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=config.SerializeToString())


def machine_of(daemon: Containerd, container: str) -> bytes:
    return daemon.exec(container, "cat", "/proc/sys/kernel/random/boot_id").stdout


def test_a_sandbox_of_the_client_is_there_before_and_after_its_containers(
    containerd: Containerd,
    events: Recorder,
    sandbox: Sandbox,
) -> None:
    sandbox.create(pod=pod_config("pod-7"))
    assert sandbox.ask("Status").state == NOT_READY
    assert containerd.runtime.run_dir is not None
    record = containerd.runtime.run_dir / "sbs" / f"{containerd.namespace}--{sandbox.id}"
    assert not record.exists(), "it is prepared, and nothing runs yet"
    sandbox.ask("Start")
    assert record.exists()
    status = sandbox.ask("Status")
    assert (status.state, Path(f"/proc/{status.pid}/exe").readlink().name) == (READY, "qemu-system-x86_64")

    # Containers come and go by the id of the sandbox alone.
    first = sandbox.run("cat", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/hostname")
    machine, name = first.stdout.splitlines()
    assert name == b"pod-7"
    second, third = start_in(sandbox), start_in(sandbox)
    try:
        assert machine_of(containerd, second) == machine + b"\n"
        assert containerd.task_pid(third) == status.pid
        containerd.ctr("task", "kill", "--signal", "SIGTERM", second)
        events.wait_for(second, "exit", process=second)
        assert containerd.delete_task(second) == 143
        assert sandbox.ask("Status").state == READY
        if sandbox.has_sandboxers:
            metrics = sandbox.ask("Metrics").metrics
            assert (metrics.id, metrics.data.value != b"") == (sandbox.id, True)
        assert leaks.forgotten(containerd) == [], "what a sandbox holds is its own"

        # Its end is that of everything in it, and everybody is told.
        over = sandbox.begin("Wait")
        sandbox.ask("Stop")
        ended = sandbox.answer(over)
        assert ended is None or ended.exit_status == 0
        assert sandbox.ask("Status").state == NOT_READY
        assert not record.exists()
        assert containerd.task_status(third) == "STOPPED"
        assert containerd.delete_task(third) == 137
        events.wait_for(third, "delete")
        assert events.topics(third) == ["create", "start", "exit", "delete"]
    finally:
        containerd.remove(second)
        containerd.remove(third)


@pytest.mark.usefixtures("vm_runtime")
def test_a_sandbox_outlives_the_daemon_and_a_shim_that_is_killed_takes_all_of_it_along(
    make_containerd: MakeContainerd,
) -> None:
    with make_containerd() as daemon:
        before = leaks.snapshot(daemon)
        with sandboxes.sandbox(daemon) as sandbox:
            sandbox.create()
            sandbox.ask("Start")
            container = start_in(sandbox)
            machine = machine_of(daemon, container)
            daemon.stop_daemon(kill=True)
            daemon.start_daemon()
            assert machine_of(daemon, container) == machine
            assert sandbox.ask("Status").state == READY
            assert sandbox.run("cat", "/proc/sys/kernel/random/boot_id").stdout == machine
            kill(shim_of(daemon, sandbox.id))
            daemon.remove(container)
            forget_fifos(daemon)
        left = leaks.left_over(daemon, before)
        assert not left, "left behind:\n" + "\n".join(left)


@pytest.mark.parametrize("generation", [GENERATIONS[1]], indirect=True)
def test_the_end_of_a_sandbox_whose_vm_is_killed_is_told(
    containerd: Containerd, events: Recorder, sandbox: Sandbox
) -> None:
    """Not on 1.7, whose daemon tells the client no exit: it fails to publish it first."""
    sandbox.create()
    sandbox.ask("Start")
    container = start_in(sandbox)
    over = sandbox.begin("Wait")
    os.kill(sandbox.ask("Status").pid, signal.SIGKILL)
    assert sandbox.answer(over).exit_status == 137
    assert events.wait_for(container, "exit")[-1].exit_status == 137
    assert sandbox.ask("Status").state == NOT_READY
    assert containerd.delete_task(container) == 137
    containerd.ctr("container", "rm", container)


def test_a_sandbox_whose_configuration_is_missing_is_refused_in_words(
    containerd: Containerd,
    sandbox: Sandbox,
) -> None:
    missing = containerd.directory / "no-such.toml"
    options = AnyMessage(type_url="runtimeoptions.v1.Options")
    options.value = Options(config_path=str(missing)).SerializeToString()
    with pytest.raises(grpc.RpcError, match=str(missing)):
        sandbox.create(options=options)


@pytest.mark.parametrize("blow", [QEMU_KILLED, HUNG], ids=lambda blow: blow.name)
def test_a_vm_dies_under_an_open_exec(
    containerd: Containerd, vm_runtime: Runtime, events: Recorder, fault: Fault, blow: Blow
) -> None:
    check_death(containerd, events, fault, exec_open, blow)
