"""The generated init is a real program: it runs here, with calls that need no privilege."""

import errno
import subprocess
from pathlib import Path

from guest.initprogram import SYS_CHDIR, SYS_EXECVE, SYS_OPEN, SYS_WRITE, Argument, Call, Operand, assemble
from guest.initrd import init_calls

O_WRONLY_CREAT = 0o101  # include/uapi/asm-generic/fcntl.h: O_WRONLY | O_CREAT


def run(directory: Path, calls: list[Call], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    program = directory / "program"
    (directory / "log").touch()
    program.write_bytes(assemble(calls, log="log"))
    program.chmod(0o755)
    environment = {"FIRST": "1", "KATA_AGENT_LOG_LEVEL": "debug"}
    return subprocess.run(
        [program, *arguments], cwd=directory, env=environment, capture_output=True, timeout=30, check=False
    )


def write(descriptor: Argument, text: str) -> Call:
    return Call(SYS_WRITE, (descriptor, text, len(text)))


def test_calls_run_in_order_and_then_it_exits(tmp_path: Path) -> None:
    done = run(tmp_path, [write(1, "one "), write(1, "two"), write(2, "three")])
    assert (done.returncode, done.stdout, done.stderr) == (1, b"one two", b"three")


def test_a_saved_result_is_an_argument_of_later_calls(tmp_path: Path) -> None:
    # The mode is given by the umask alone: open gets its third argument in rdx.
    run(tmp_path, [Call(SYS_OPEN, ("file", O_WRONLY_CREAT, 0o600), save=True), write(Operand.SAVED, "text")])
    assert (tmp_path / "file").read_bytes() == b"text"


def test_arguments_and_environment_reach_the_next_program(tmp_path: Path) -> None:
    shell = Call(SYS_EXECVE, ("/bin/sh", Operand.ARGV, Operand.ENVP), "no shell")
    done = run(tmp_path, [shell], "-c", "echo $1 $FIRST $KATA_AGENT_LOG_LEVEL", "sh", "argument")
    assert (done.returncode, done.stdout) == (0, b"argument 1 debug\n")


def test_an_error_ends_the_program_with_its_number(tmp_path: Path) -> None:
    done = run(tmp_path, [Call(SYS_CHDIR, ("/no/such/directory",), "cannot enter"), write(1, "not reached")])
    assert (done.returncode, done.stdout) == (errno.ENOENT, b"")
    assert (tmp_path / "log").read_text() == "init: cannot enter\n"


def test_an_error_that_does_not_matter_is_passed_over(tmp_path: Path) -> None:
    done = run(tmp_path, [Call(SYS_CHDIR, ("/no/such/directory",)), write(1, "reached")])
    assert done.stdout == b"reached"


def test_same_calls_give_the_same_bytes() -> None:
    calls = init_calls(["virtio", "erofs"], ["/lib/modules/1/fuse.ko"])
    assert assemble(calls) == assemble(calls)


def test_init_enters_the_root_after_the_initrd_modules_and_before_the_modules_of_the_root() -> None:
    calls = init_calls(["virtio", "erofs"], ["/lib/modules/1/fuse.ko"])
    said = [argument for call in calls for argument in call.arguments if isinstance(argument, str)]
    order = [
        "/dev",
        "/modules/virtio.ko",
        "/modules/erofs.ko",
        "/dev/vda",
        "/lib/modules/1/fuse.ko",
        "/sbin/init",
    ]
    assert [said.index(name) for name in order] == sorted(said.index(name) for name in order)
