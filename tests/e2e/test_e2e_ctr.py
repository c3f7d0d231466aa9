"""What `ctr container`, `ctr task` and the flags of `ctr run` can do, beyond what other files are about.

Most of it happens to one container, which is created, started and asked about in separate steps as a client
with a life of its own would do; the rest are flags that need a container of their own. All of it runs on runc
as well: what is expected here is what clients know from there.
"""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import NoLeaks
from tests.e2e.test_e2e_crashes import wait_until
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Recorder
from tests.harness.image import IMAGE, unpack_image
from tests.harness.runtimes import Runtime

WORKLOAD = "trap 'exit 143' TERM; echo begun; while :; do sleep 1000 & wait $!; done"


@dataclass(frozen=True, slots=True)
class Dressed:
    """A container with whatever flags get along with each other, created and started in two steps."""

    id: str
    pid_file: Path
    log: Path


@pytest.fixture(scope="module")
def dressed(containerd: Containerd) -> Iterator[Dressed]:
    container = containerd.new_id("dressed")
    pid_file, log, variables = (containerd.directory / f"dressed.{name}" for name in ("pid", "log", "env"))
    variables.write_text("FROM_FILE=one two\nBOTH=of the file\n")
    flags = ["--runtime", containerd.runtime.name, "--env-file", str(variables), "--env", "BOTH=of the flag"]
    flags += ["--label", "made=by hand", "--annotation", "com.example/note=kept", "--privileged"]
    flags += ["--cwd", "/home"]
    try:
        containerd.ctr("container", "create", *flags, "--", IMAGE, container, "sh", "-c", WORKLOAD)
        started = ["--detach", "--pid-file", str(pid_file), "--log-uri", f"file://{log}"]
        started += ["--no-pivot"] if containerd.version() >= (1, 7) else []
        containerd.ctr("task", "start", *started, container)
        yield Dressed(container, pid_file, log)
    finally:
        containerd.remove(container)


def test_a_container_without_a_task_is_listed_and_deleted(containerd: Containerd, no_leaks: NoLeaks) -> None:
    with no_leaks():
        container = containerd.new_id()
        containerd.ctr("container", "create", "--runtime", containerd.runtime.name, IMAGE, container, "true")
        assert container in containerd.ctr("container", "ls", "--quiet").stdout.decode().split()
        assert containerd.task_status(container) is None
        for command in (["pause"], ["kill"], ["metrics"], ["ps"], ["exec", "--exec-id", "x"]):
            operands = ["true"] if command[0] == "exec" else []
            refused = containerd.ctr("task", *command, container, *operands, check=False)
            assert (refused.exit_status, b"not found" in refused.stderr) == (1, True), refused
        containerd.ctr("container", "rm", container)
        assert container not in containerd.ctr("container", "ls", "--quiet").stdout.decode().split()


def test_the_client_is_told_of_a_container_what_it_was_created_with(
    containerd: Containerd, dressed: Dressed
) -> None:
    told = json.loads(containerd.ctr("container", "info", dressed.id).stdout)
    assert told["Runtime"]["Name"] == containerd.runtime.name
    assert told["Labels"]["made"] == "by hand"
    assert told["Spec"]["annotations"]["com.example/note"] == "kept"
    containerd.ctr("container", "label", dressed.id, "made=", "more=words")
    told = json.loads(containerd.ctr("container", "info", dressed.id).stdout)
    assert ("made" in told["Labels"], told["Labels"]["more"]) == (False, "words")


def test_the_pid_file_holds_what_the_lists_say(containerd: Containerd, dressed: Dressed) -> None:
    pid = containerd.task_pid(dressed.id)
    assert int(dressed.pid_file.read_text()) == pid
    listed = containerd.ctr("task", "ps", dressed.id).stdout.decode().splitlines()[1:]
    assert str(pid) in [line.split()[0] for line in listed]
    assert dressed.id in containerd.ctr("task", "ls", "--quiet").stdout.decode().split()


def test_the_output_of_a_started_task_is_in_its_log(dressed: Dressed) -> None:
    wait_until(lambda: dressed.log.exists() and dressed.log.read_text() == "begun\n")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('echo "$FROM_FILE, $BOTH"', "one two, of the flag\n"),
        ("readlink /proc/1/cwd", "/home\n"),
        # All of a privileged container, and none of the masks.
        ("grep CapBnd /proc/self/status | tr -d '0\\t'", r"CapBnd:1fff[ef]f{6}\n"),
        ("grep -c '^sysfs /sys sysfs rw' /proc/mounts; echo", "1\n\n"),
        (
            "mount -t tmpfs none /mnt 2>&1 || mkdir -p /mnt && mount -t tmpfs none /mnt && echo y",
            "(.*\n)?y\n",
        ),
    ],
)
def test_what_the_flags_are_in_the_container(
    containerd: Containerd, dressed: Dressed, script: str, expected: str
) -> None:
    result = containerd.exec(dressed.id, "sh", "-c", script)
    assert re.fullmatch(expected, result.stdout.decode()), result


EXECS = [
    (["--user", "user"], "id -u", "1000\n"),
    (["--user", "1234:4321"], "echo $(id -u) $(id -g)", "1234 4321\n"),
    (["--user", "0:10"], "id -g", "10\n"),
    (["--cwd", "/tmp"], "pwd", "/tmp\n"),
    ([], "pwd", "/home\n"),
    ([], 'echo "$FROM_FILE"', "one two\n"),
]


@pytest.mark.parametrize(("flags", "script", "expected"), EXECS)
def test_the_flags_of_an_exec(
    containerd: Containerd, dressed: Dressed, flags: list[str], script: str, expected: str
) -> None:
    result = containerd.exec(dressed.id, "sh", "-c", script, flags=flags)
    assert (result.stdout.decode(), result.exit_status) == (expected, 0), result


def test_a_detached_exec_outlives_its_client_and_is_deleted_by_its_id(
    containerd: Containerd, dressed: Dressed, events: Recorder
) -> None:
    log = containerd.directory / "detached.log"
    flags = ["--detach", "--exec-id", "detached", "--log-uri", f"file://{log}"]
    script = "trap 'exit 9' USR1; echo begun; while :; do sleep 1000 & wait $!; done"
    containerd.ctr("task", "exec", *flags, dressed.id, "sh", "-c", script)
    wait_until(lambda: log.exists() and log.read_text() == "begun\n")
    kept = containerd.ctr("task", "rm", "--exec-id", "detached", dressed.id, check=False)
    assert kept.exit_status != 0, "it runs"
    containerd.ctr("task", "kill", "--signal", "SIGUSR1", "--exec-id", "detached", dressed.id)
    told = events.wait_for(dressed.id, "exit", process="detached")
    assert [e.exit_status for e in told if e.topic == "/tasks/exit" and e.body["id"] == "detached"] == [9]
    containerd.ctr("task", "rm", "--exec-id", "detached", dressed.id, check=False)
    gone = containerd.ctr("task", "kill", "--exec-id", "detached", dressed.id, check=False)
    assert (gone.exit_status, b"not found" in gone.stderr) == (1, True), gone


@pytest.mark.parametrize("signal", ["10", "USR1", "SIGUSR1"])
def test_a_signal_has_a_number_and_two_names(containerd: Containerd, dressed: Dressed, signal: str) -> None:
    script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 1000 & wait $!; done"
    arguments = containerd.exec_arguments(dressed.id, "sh", "-c", script, flags=["--exec-id", "signalled"])
    with containerd.popen(*arguments) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        containerd.ctr("task", "kill", "--signal", signal, "--exec-id", "signalled", dressed.id)
        output, _ = client.communicate(timeout=TIMEOUT)
        assert (output, client.returncode) == (b"caught\n", 5)


def kept_by(containerd: Containerd) -> tuple[set[bytes], set[bytes]]:
    """Return the images and the content that the daemon has."""
    # What a client gives up is collected later, but before this ends.
    containerd.ctr("image", "tag", IMAGE, "localhost/collect:now")
    containerd.ctr("image", "rm", "--sync", "localhost/collect:now")
    images, content = (containerd.ctr(what, "ls", "--quiet").stdout for what in ("image", "content"))
    return set(images.split()), set(content.split())


def layer_of(containerd: Containerd, image: str) -> tarfile.TarFile:
    """Return the layer in a checkpoint's index: what the container wrote."""
    [line] = [row for row in containerd.ctr("image", "ls").stdout.decode().splitlines() if image in row]
    index = json.loads(containerd.ctr("content", "get", line.split()[2]).stdout)
    [layer] = [entry for entry in index["manifests"] if "layer" in entry["mediaType"]]
    data = containerd.ctr("content", "get", layer["digest"]).stdout
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:gz")


def test_a_checkpoint_has_the_files_of_a_container_that_goes_on(
    containerd: Containerd, dressed: Dressed, events: Recorder
) -> None:
    """`ctr` restores none of these, whatever the runtime is: the spec is only in one that has a task."""
    image = "localhost/checkpoint:files"
    # Not in a directory of the image: overlayfs copies that to the upper layer first, by a work directory
    # that each `ctr task exec --user NAME` takes away: it mounts the layers of a running container again.
    assert containerd.exec(dressed.id, "sh", "-c", "echo mark >/marked").exit_status == 0
    before = events.topics(dressed.id).count("paused")
    try:
        containerd.ctr("container", "checkpoint", "--image", "--rw", dressed.id, image)
        assert containerd.task_status(dressed.id) == "RUNNING"
        wait_until(lambda: events.topics(dressed.id).count("resumed") == before + 1)
        assert events.topics(dressed.id).count("paused") == before + 1
        with layer_of(containerd, image) as layer:
            marked = layer.extractfile("marked")
            assert marked is not None
            assert marked.read() == b"mark\n"
        for flags in ([], ["--rw"], ["--live"]):
            restored = containerd.new_id("restored")
            refused = containerd.ctr("container", "restore", *flags, restored, image, check=False)
            assert (refused.exit_status, refused.stderr) == (1, b"ctr: media type not found\n"), refused
            assert restored not in containerd.ctr("container", "ls", "--quiet").stdout.decode().split()
            containerd.ctr("snapshots", "rm", restored, check=False)  # of the client's attempt
    finally:
        containerd.ctr("image", "rm", "--sync", image, check=False)


def test_checkpoints_are_refused_in_words_and_end_nothing(
    containerd: Containerd, vm_runtime: Runtime, dressed: Dressed, tmp_path: Path
) -> None:
    """Not on runc, which makes them where CRIU is installed. A client pauses the task before it asks."""
    before = kept_by(containerd)
    image, paths = "localhost/checkpoint:task", ["--image-path", str(tmp_path), "--work-path", str(tmp_path)]
    for arguments in (
        ["task", "checkpoint", dressed.id],
        ["task", "checkpoint", "--exit", *paths, dressed.id],
        ["container", "checkpoint", "--task", dressed.id, image],
        ["container", "checkpoint", "--task", "--image", "--rw", dressed.id, image],
    ):
        refused = containerd.ctr(*arguments, check=False)
        assert refused.exit_status != 0
        assert b"checkpoints of tasks are not supported" in refused.stderr, refused
        assert containerd.task_status(dressed.id) == "RUNNING"
    assert kept_by(containerd) == before
    assert list(tmp_path.iterdir()) == []
    assert containerd.exec(dressed.id, "echo", "alive").stdout == b"alive\n"


def test_a_signal_to_all_processes_ends_execs_and_container(containerd: Containerd, events: Recorder) -> None:
    with containerd.running() as container:
        arguments = containerd.exec_arguments(container, "sh", "-c", "echo ready; exec sleep 1000")
        with containerd.popen(*arguments) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n"
            containerd.ctr("task", "kill", "--all", "--signal", "KILL", container)
            client.communicate(timeout=TIMEOUT)
            assert client.returncode == 137
        events.wait_for(container, "exit", process=container)
        assert containerd.delete_task(container) == 137
        # The container is still there, and is given another task.
        containerd.ctr("task", "start", "--detach", "--null-io", container)
        assert containerd.exec(container, "echo", "again").stdout == b"again\n"
        gone = containerd.ctr("task", "rm", "--force", container, "nobody", check=False)
        assert gone.exit_status != 0
        assert b"nobody" in gone.stderr, gone
        assert containerd.task_status(container) is None


def test_a_root_of_the_client_in_a_network_namespace_of_the_client(
    containerd: Containerd, no_leaks: NoLeaks
) -> None:
    """Nothing is mounted for such a root, and the namespace is the pod's: its pid shows it."""
    root = containerd.directory / "own-root"
    unpack_image(root)
    (root / "home/mark").write_text("mine")
    holder = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
    try:
        host = Path("/proc/self/ns/net").readlink()
        own = Path(f"/proc/{holder.pid}/ns/net")
        wait_until(lambda: own.readlink() != host)
        with no_leaks():
            container = containerd.new_id()
            flags = ["--runtime", containerd.runtime.name, "--fifo-dir", f"{containerd.directory}/fifo"]
            flags += ["--cpu-shares", "512", "--cgroup", f"/{containerd.namespace}/own"]
            flags += ["--detach", "--no-pivot", "--with-ns", f"network:{own}", "--rootfs"]
            try:
                command = ("/bin/sh", "-c", "PATH=/bin; cat /home/mark; touch /home/made; sleep 1000")
                containerd.ctr("run", *flags, str(root), container, *command)
                wait_until((root / "home/made").exists)
                assert Path(f"/proc/{containerd.task_pid(container)}/ns/net").readlink() == own.readlink()
            finally:
                containerd.remove(container)
        assert (root / "home/mark").read_text() == "mine"
    finally:
        holder.kill()
        holder.wait()


# Of all calls, this profile refuses those that make a directory, with "No space left on device" (errno.h).
NO_DIRECTORIES = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
}


def test_a_root_of_another_snapshotter_and_what_is_left_of_the_flags(
    containerd: Containerd, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(NO_DIRECTORIES))
    flags = ["--snapshotter", "native", "--snapshotter-label", "made=by hand", "--platform", "linux/amd64"]
    flags += ["--seccomp", "--seccomp-profile", str(profile), "--net-host"]
    flags += ["--rootfs-propagation", "rslave", "--runc-root", str(tmp_path / "runc")]
    script = "mkdir /x; cat /etc/hosts; touch /home/new && echo done"
    result = containerd.run("sh", "-c", script, flags=flags)
    assert b"No space left on device" in result.stderr, result
    assert result.stdout == Path("/etc/hosts").read_bytes() + b"done\n"
    assert result.exit_status == 0


def test_a_container_is_what_a_file_says(containerd: Containerd, no_leaks: NoLeaks) -> None:
    """The file is the spec that the client told of another container.

    That one's snapshot was to be kept, which is no promise: it is nobody's then, and the daemon collects it.
    """
    root = containerd.directory / "root-of-file"
    unpack_image(root)
    other = containerd.new_id()
    containerd.ctr("container", "create", "--runtime", containerd.runtime.name, IMAGE, other, "cat", "/mark")
    spec = json.loads(containerd.ctr("container", "info", "--spec", other).stdout)
    containerd.ctr("container", "rm", "--keep-snapshot", other)
    assert other not in containerd.ctr("container", "ls", "--quiet").stdout.decode().split()
    (root / "mark").write_text("of the file\n")
    spec["root"]["path"] = str(root)
    file = containerd.directory / "spec.json"
    file.write_text(json.dumps(spec))
    with no_leaks():
        container = containerd.new_id()
        flags = ["--runtime", containerd.runtime.name, "--config", str(file)]
        containerd.ctr("container", "create", *flags, container)
        started = containerd.ctr("task", "start", "--fifo-dir", f"{containerd.directory}/fifo", container)
        assert started.stdout == b"of the file\n"
        assert containerd.task_status(container) is None, "a client that stayed deletes the task"
        containerd.ctr("container", "rm", container)
