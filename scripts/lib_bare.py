"""Bare boots of the built guest: QEMU and nothing around it, as the measure for what the runtime adds.

The machine is the one that the runtime makes: its command line is taken from a running VMM, less what serves
the runtime (shared directory, monitor, room for hot-plug), and with a console and a serial port of our own.
"""

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 120.0
# The agent's line on the console: seconds of the guest's clock at its first instruction and when it serves.
READY = re.compile(rb"msg=ready began=([0-9.]+) .*serving=([0-9.]+)")
PORT = "agent.channel.0"
# Options of the runtime's command line that make the machine what it is; the rest is wiring.
KEPT = {
    "-machine",
    "-cpu",
    "-m",
    "-smp",
    "-kernel",
    "-initrd",
    "-append",
    "-accel",
    "-object",
    "-numa",
    "-rtc",
}
KEPT |= {"-global", "-blockdev", "-display", "-vga"}
KEPT_DEVICES = ("virtio-blk-pci", "virtio-rng-pci")
KEPT_FLAGS = {"-nodefaults", "-no-user-config", "-no-reboot", "-nographic"}

# The guest that only writes: modules as the initrd has them, in whatever order they depend on each other.
WRITER = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for pass in 1 2 3; do for m in /modules/*.ko; do /bin/busybox insmod $m 2>/dev/null; done; done
for port in /dev/vport*; do :; done
/bin/busybox dd if=/dev/zero of=$port bs=64k count={blocks}
/bin/busybox poweroff -f
"""
BLOCK = 64 << 10


@dataclass(frozen=True, slots=True)
class Boot:
    """Seconds since QEMU was started."""

    first_instruction: float
    agent_ready: float


def machine_options(argv: Sequence[str]) -> list[str]:
    """Return what of a VMM's command line describes the machine."""
    kept = [argv[0]]
    rest = list(argv[1:])
    while rest:
        option = rest.pop(0)
        value = rest.pop(0) if rest and not rest[0].startswith("-") else None
        if option in KEPT_FLAGS:
            kept.append(option)
        elif value is not None and (
            option in KEPT or (option == "-device" and value.startswith(KEPT_DEVICES))
        ):
            kept += [option, value]
    return kept


def boot(options: Sequence[str]) -> Boot:
    """Boot until the agent serves, then end the machine."""
    with tempfile.TemporaryDirectory(prefix="bare-") as name:
        console = Path(name, "console")
        argv = [*options, "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
        argv += _port(Path(name, "port"))
        began = time.monotonic()
        with _running(argv):
            while (match := READY.search(console.read_bytes() if console.exists() else b"")) is None:
                # A console in a file is looked at: the loop's period bounds the error.
                if time.monotonic() - began > TIMEOUT:
                    raise RuntimeError(f"the bare machine did not boot: {console.read_bytes()[-500:]!r}")
                time.sleep(0.005)
            ready = time.monotonic() - began
    spent = float(match[2]) - float(match[1])
    return Boot(first_instruction=ready - spent, agent_ready=ready)


def serial_throughput(options: Sequence[str], mib: int) -> float:
    """Return MiB/s from a guest that only writes into the port to a host that only reads."""
    initrd = options[options.index("-initrd") + 1]
    with tempfile.TemporaryDirectory(prefix="bare-") as name:
        directory = Path(name)
        combined = directory / "initrd"
        combined.write_bytes(Path(initrd).read_bytes() + _writer_archive(directory, mib))
        argv = [str(combined) if option == initrd else option for option in options]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "port"))
            listener.listen()
            argv += ["-chardev", f"socket,id=agent,path={directory}/port", *_serial_device()]
            with _running([*argv, "-serial", "none"]):
                listener.settimeout(TIMEOUT)
                port, _ = listener.accept()
                with port:
                    return _read_rate(port, mib << 20)


def _read_rate(port: socket.socket, expected: int) -> float:
    port.settimeout(TIMEOUT)
    buffer = bytearray(1 << 20)
    count = port.recv_into(buffer)
    began = time.monotonic()
    received = 0
    while received + count < expected:
        size = port.recv_into(buffer)
        if not size:
            raise RuntimeError(f"the guest wrote {received} bytes and then nothing, expected {expected}")
        received += size
    return received / (time.monotonic() - began) / (1 << 20)


def _writer_archive(directory: Path, mib: int) -> bytes:
    """Return a second initrd archive: the kernel unpacks it over the first, so its init wins."""
    tree = directory / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin" / "busybox")
    script = tree / "init"
    script.write_text(WRITER.format(blocks=(mib << 20) // BLOCK))
    script.chmod(0o755)
    names = "bin\nbin/busybox\ninit\n"
    argv = ["cpio", "--quiet", "-o", "-H", "newc"]
    return subprocess.run(argv, cwd=tree, input=names.encode(), capture_output=True, check=True).stdout


def _serial_device() -> list[str]:
    return [
        *("-device", "virtio-serial-pci,id=serial,romfile=,disable-legacy=on"),
        *("-device", f"virtserialport,bus=serial.0,nr=1,chardev=agent,name={PORT}"),
    ]


def _port(path: Path) -> list[str]:
    return ["-chardev", f"socket,id=agent,path={path},server=on,wait=off", *_serial_device()]


@contextmanager
def _running(argv: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield
    except (OSError, RuntimeError) as exc:
        process.kill()
        text = process.communicate()[1].decode(errors="replace")
        raise RuntimeError(f"{exc}; QEMU said: {text or 'nothing'}") from exc
    finally:
        process.kill()
        process.communicate()
