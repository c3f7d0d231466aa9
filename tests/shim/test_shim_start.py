"""`start` and `delete` as containerd runs them: real processes, a real socket, a real fork."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from protos.containerd import task_v2_pb2, types_pb2
from shim import bundle
from tests.shim.bundles import ROOT, Bundle, call, end
from vc.oci.spec import DIALECTS


async def test_start_prints_the_address_of_a_server_that_shutdown_ends(made: Bundle) -> None:
    output = made.shim("start", stdin=made.bootstrap())
    assert output == f"unix://{made.socket()}".encode()
    assert (made.path / "address").read_bytes() == output
    assert made.socket().stat().st_mode & 0o777 == 0o600
    pid = made.pid()
    connected = await call(made.socket(), "Connect")
    assert connected == task_v2_pb2.ConnectResponse(shim_pid=pid)
    await call(made.socket(), "Shutdown")
    end(pid)
    assert not made.socket().exists()
    assert made.read_log() == ""


async def test_the_server_is_a_daemon_of_its_own_that_holds_nothing_of_the_bundle(made: Bundle) -> None:
    made.shim("start", stdin=made.bootstrap())
    await call(made.socket(), "Connect")  # answered, so it is past its start-up
    process = Path("/proc", str(made.pid()))
    assert os.getsid(made.pid()) == made.pid()
    assert os.getpgid(made.pid()) == made.pid()
    assert (process / "cwd").readlink() == Path("/")
    assert [(process / "fd" / number).readlink() for number in "01"] == [Path("/dev/null")] * 2
    assert (process / "fd" / "2").readlink() == made.path / "log"
    soft, hard = (process / "limits").read_text().partition("Max open files")[2].split()[:2]
    assert soft == hard
    if os.geteuid() == 0:
        assert (process / "ns" / "mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
        ours = int(Path("/proc/self/oom_score_adj").read_text())
        assert int((process / "oom_score_adj").read_text()) == min(ours + 1, 1000)


def test_a_server_whose_bundle_goes_before_anybody_connects_ends(made: Bundle) -> None:
    """A client was killed during `start`: containerd killed that, too, and had no address to end the rest by.

    The server was left for five minutes.
    """
    made.shim("start", stdin=made.bootstrap())
    pid = made.pid()
    made.path.rename(made.path.with_name("removed"))
    end(pid)
    assert not made.socket().exists()
    assert "before it connected" in made.read_log()


async def test_a_server_that_is_known_outlives_its_bundle(made: Bundle) -> None:
    """containerd renames and removes it while the last calls are still under way."""
    made.shim("start", stdin=made.bootstrap())
    pid = made.pid()
    async with await trio.open_unix_socket(str(made.socket())):
        await call(made.socket(), "Connect")
        made.path.rename(made.path.with_name("removed"))
        assert (await call(made.socket(), "Connect")) == task_v2_pb2.ConnectResponse(shim_pid=pid)
    await call(made.socket(), "Shutdown")
    end(pid)


def test_a_second_start_finds_the_living_server(made: Bundle) -> None:
    first = made.shim("start", stdin=made.bootstrap())
    pid = made.pid()
    (made.path / "address").unlink()
    assert made.shim("start", stdin=made.bootstrap()) == first
    assert (made.path / "address").read_bytes() == first
    assert made.pid() == pid


async def test_a_socket_that_a_killed_server_left_is_replaced(made: Bundle) -> None:
    made.shim("start", stdin=made.bootstrap())
    end(made.pid(), signal.SIGKILL)
    assert made.socket().exists()
    made.shim("start", stdin=made.bootstrap())
    await call(made.socket(), "Connect")


def test_a_pods_container_gets_the_sandboxs_server_or_an_error(made: Bundle) -> None:
    pod = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "c1",
    }
    server = made.shim("start", stdin=made.bootstrap())
    pid = made.pid()
    (made.path / "config.json").write_text(json.dumps({"annotations": pod}))
    assert made.shim("start", stdin=made.bootstrap("c2"), task_id="c2") == server
    end(pid, signal.SIGKILL)
    failed = made.run("start", stdin=made.bootstrap("c2"), task_id="c2")
    assert failed.returncode == 1
    assert b"sandbox 'c1'" in failed.stdout
    assert failed.stdout.count(b"\n") == 1


@pytest.mark.parametrize(
    ("flags", "config", "word"),
    [
        ((), '{"annotations": {"io.kubernetes.cri.container-type": "x"}}', b"container-type"),
        ((), '{"annotations": {"io.kubernetes.cri.container-type": 1}}', b"annotations"),
        ((), '{"io.kubernetes.cri.container-type"', b"not JSON"),
        (("-socket", "/" + 120 * "x"), "{}", b"/xxx"),
    ],
)
def test_what_start_cannot_use_is_one_line_and_leaves_nothing(
    made: Bundle, flags: tuple[str, ...], config: str, word: bytes
) -> None:
    (made.path / "config.json").write_text(config)
    done = made.run("start", *flags, stdin=made.bootstrap())
    assert done.returncode == 1
    assert word in done.stdout
    assert done.stdout.count(b"\n") == 1
    assert sorted(path.name for path in made.path.iterdir()) == ["config.json", "log"]
    assert list(made.sockets.iterdir()) == []


def test_start_leaves_it_to_create_to_judge_a_broken_config_that_names_no_pod(made: Bundle) -> None:
    (made.path / "config.json").write_text("{")
    made.shim("start", "-nonsense=1", stdin=made.bootstrap())


def test_start_imports_nothing_heavy(made: Bundle) -> None:
    """Every pod pays for the imports of `start`: the interpreter itself is to be the larger part."""
    program = """
import os, sys
before = set(sys.modules)
from shim import __main__, args, start, address, bootstrap, bundle
parsed = args.parse(["-namespace", "ns", "-id", "c1", "-socket", sys.argv[1], "start"])
os.fork = lambda: os.getpid()
start.start(parsed)
print(*sorted(set(sys.modules) - before), sep="\\n")
"""
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}",
            str(made.socket()),
        ],
        cwd=made.path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    (made.path / "shim.pid").unlink()
    imported = set(done.stdout.decode().split())
    ours = {
        "shim",
        *(f"shim.{name}" for name in ("__main__", "address", "args", "bootstrap", "bundle", "start")),
    }
    assert imported - ours <= {"_socket", "_sha256", "errno", "_stat", "stat"}


def test_start_knows_the_same_pod_annotations_as_the_library() -> None:
    """The library may not be imported there, so the table stands twice."""
    ours = {
        (type_key, id_key, value, kind)
        for type_key, id_key in bundle.POD_ANNOTATIONS
        for value, kind in bundle.TYPES.items()
    }
    for dialect in DIALECTS:
        for value, kind in (
            (dialect.sandbox_value, bundle.SANDBOX),
            (dialect.container_value, bundle.CONTAINER),
        ):
            assert (dialect.type_key, dialect.sandbox_id_key, value, kind) in ours
    assert len(bundle.POD_ANNOTATIONS) == len(DIALECTS)


def test_delete_after_a_crash_ends_what_is_left_and_answers_137(made: Bundle) -> None:
    made.shim("start", stdin=made.bootstrap())
    pid = made.pid()
    (made.path / "init.pid").write_text("4321")
    answer = task_v2_pb2.DeleteResponse.FromString(made.shim("delete", "-bundle", str(made.path)))
    assert (answer.pid, answer.exit_status) == (4321, 137)
    assert abs(answer.exited_at.ToNanoseconds() - time.time_ns()) < 60e9
    end(pid)
    assert not made.socket().exists()


def test_delete_after_a_crash_tells_the_exit_that_was_there_before_it(made: Bundle) -> None:
    """The shim of a task that had ended with 5 was killed, and it was announced to have ended with 137."""
    bundle.write_exit(str(made.path), 5, 1136214245.5)
    answer = task_v2_pb2.DeleteResponse.FromString(made.shim("delete", "-bundle", str(made.path)))
    assert answer.exit_status == 5
    assert answer.exited_at.ToNanoseconds() == 1136214245500000000


@pytest.mark.parametrize("damaged", ["", "5", "-1 1.0", "5 1.0.0", "x 1", "5 now"])
def test_a_note_of_an_exit_that_makes_no_sense_is_none(tmp_path: Path, damaged: str) -> None:
    (tmp_path / bundle.EXIT).write_text(damaged)
    assert bundle.read_exit(str(tmp_path)) is None


def test_delete_removes_the_socket_of_a_killed_server(made: Bundle) -> None:
    made.shim("start", stdin=made.bootstrap())
    end(made.pid(), signal.SIGKILL)
    made.shim("delete", "-bundle", str(made.path))
    assert not made.socket().exists()


def test_delete_of_what_is_gone_already_is_a_success(made: Bundle) -> None:
    (made.path / "config.json").unlink()
    for path in (made.path, made.path / "gone"):
        answer = task_v2_pb2.DeleteResponse.FromString(made.shim("delete", "-bundle", str(path)))
        assert answer.exit_status == 137


def test_delete_that_finds_nothing_imports_nothing_that_takes_time(made: Bundle) -> None:
    """It is run after each container, and containerd's client waits for it."""
    code = "from shim.__main__ import main; main(); open('modules', 'w').write(' '.join(sys.modules))"
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    argv += ["-namespace", "ns", "-address", "/a.sock", "-id", "c1", "-bundle", str(made.path), "delete"]
    subprocess.run(argv, cwd=made.path, check=True, stdout=subprocess.PIPE)
    loaded = set((made.path / "modules").read_text().split())
    heavy = {"google", "ctypes", "signal", "subprocess", "pathlib", "typing", "trio", "vc", "socket"}
    assert not heavy & loaded


def test_delete_of_a_pods_container_leaves_the_pod_alone(made: Bundle) -> None:
    made.shim("start", stdin=made.bootstrap())
    pod = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "c1"}
    (made.path / "config.json").write_text(json.dumps({"annotations": pod}))
    made.shim("delete", "-bundle", str(made.path), task_id="c2")
    probe = socket.socket(socket.AF_UNIX)
    probe.connect(str(made.socket()))
    probe.close()


def test_delete_removes_what_the_sandbox_left_in_its_run_directory(made: Bundle) -> None:
    left = made.sockets / "run" / "sbs" / "ns--c1"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (made.path / "run-dir").write_text(str(made.sockets / "run"))
    made.shim("delete", "-bundle", str(made.path))
    assert not left.exists()


def test_delete_never_signals_a_process_that_is_not_the_server(made: Bundle) -> None:
    """A process id in a file may have been given to somebody else since."""
    bystander = subprocess.Popen(["/bin/sleep", "60"])
    (made.path / "shim.pid").write_text(str(bystander.pid))
    made.shim("delete", "-bundle", str(made.path))
    (made.path / "shim.pid").unlink()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_delete_unmounts_the_root_file_system(made: Bundle) -> None:
    rootfs = made.path / "rootfs"
    rootfs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(rootfs)], check=True)
    (rootfs / "inner").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(rootfs / "inner")], check=True)
    made.shim("delete", "-bundle", str(made.path))
    assert list(rootfs.iterdir()) == []
    assert not os.path.ismount(rootfs)


def test_info_is_a_description_with_the_options_that_were_given(made: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shim", "-info"],
        input=b"\x0a\x09runc.v1.X\x12\x01x",
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    info = types_pb2.RuntimeInfo.FromString(done.stdout)
    assert (info.name, info.options.type_url, done.stderr) == ("io.containerd.kata.v2", "runc.v1.X", b"")
    assert json.loads(info.features.value)["ociVersionMin"]


def test_v_prints_a_version(made: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shim", "-v"],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith(b"io.containerd.kata.v2: version ")
