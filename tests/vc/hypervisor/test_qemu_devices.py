"""The devices that QEMU makes of our command line, asked of QEMU itself: a machine that never runs."""

import json
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vc.hypervisor.base import VMConfig
from vc.hypervisor.qemu.command import HOTPLUG_PORTS, Wiring, command_line
from vc.unixsock import listen

QEMU = Path("/usr/bin/qemu-system-x86_64")
UUID = "1119305b-ef8a-4fe5-9d2c-f05c4f32bba4"

Ask = Callable[..., object]

# All that the guest's accesses can reach, by QEMU's names. A new device is a new way into QEMU: it belongs
# here and into docs/security.md, with the reason why a pod needs it.
DEVICES = {
    # The board: what firmware and kernel expect of a PC.
    **dict.fromkeys(("q35-pcihost", "mch", "ICH9-LPC", "ioapic", "hpet", "fw_cfg_io", "kvmvapic"), 1),
    **dict.fromkeys(("isa-pit", "mc146818rtc", "port92", "isa-pcspk"), 1),
    **dict.fromkeys(("isa-i8259", "i8257"), 2),
    **dict.fromkeys(("i8042", "ps2-kbd", "ps2-mouse"), 1),
    # The pod's: console, agent, root, randomness, and places for what is plugged later.
    "isa-serial": 1,
    **dict.fromkeys(("virtio-serial-pci", "virtio-serial-device", "virtserialport"), 1),
    **dict.fromkeys(("virtio-blk-pci", "virtio-blk-device"), 1),
    **dict.fromkeys(("virtio-rng-pci", "virtio-rng-device"), 1),
    "pcie-root-port": HOTPLUG_PORTS,
}


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Return what asks a QEMU of our command line, stopped before its first instruction."""
    if shutil.which(str(QEMU)) is None:
        pytest.skip(f"{QEMU} is missing")
    for name in ("kernel", "image"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    config = VMConfig(
        qemu=QEMU, kernel=tmp_path / "kernel", image=tmp_path / "image", memory_mib=64, accelerator="tcg"
    )
    path = tmp_path / "qmp.sock"
    with (
        listen(path) as qmp,
        listen(tmp_path / "agent.sock") as agent,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(path))
        console, theirs = socket.socketpair()
        wiring = Wiring(qmp=qmp.fileno(), console=theirs.fileno(), agent=agent.fileno())
        argv = command_line(config, wiring, vmid="0" * 16, uuid=UUID)
        kernel = argv.index("-kernel")
        del argv[kernel : argv.index("-append") + 2]  # a machine that never runs needs none
        descriptors = (wiring.qmp, wiring.console, agent.fileno())
        with console, theirs, subprocess.Popen([*argv, "-S"], pass_fds=descriptors) as vmm:
            try:
                with client.makefile("rwb") as stream:
                    assert "QMP" in json.loads(stream.readline())

                    def execute(command: str, **arguments: object) -> object:
                        request = {"execute": command, "arguments": arguments}
                        stream.write(json.dumps(request).encode() + b"\n")
                        stream.flush()
                        return json.loads(stream.readline())["return"]

                    execute("qmp_capabilities")
                    yield execute
            finally:
                vmm.kill()


def test_a_machine_has_these_devices_and_no_others(ask: Ask) -> None:
    tree = str(ask("human-monitor-command", **{"command-line": "info qtree"}))
    found = Counter(re.findall(r"(?m)^ *dev: ([^,]+),", tree))
    assert found == DEVICES


def test_the_guest_talks_through_the_console_and_the_agents_port_and_reaches_no_monitor(ask: Ask) -> None:
    tree = str(ask("human-monitor-command", **{"command-line": "info qtree"}))
    ends = dict.fromkeys(re.findall(r'(?m)^ *chardev = "([^"]+)"', tree))
    serial = str(ask("qom-get", path="/machine/peripheral-anon/device[0]", property="chardev"))
    assert {*ends, serial} == {"agent", "console"}
    chardevs = ask("query-chardev")
    assert isinstance(chardevs, list)
    assert {chardev["label"] for chardev in chardevs} == {"agent", "console", "qmp"}


def test_memory_is_neither_dumped_nor_merged_and_the_root_is_read_only(ask: Ask) -> None:
    assert ask("qom-get", path="/machine", property="dump-guest-core") is False
    assert ask("qom-get", path="/machine", property="mem-merge") is False
    assert ask("qom-get", path="/objects/memory", property="merge") is False
    assert ask("qom-get", path="/objects/memory", property="dump") is False
    blocks = ask("query-block")
    assert isinstance(blocks, list)
    assert [block["inserted"]["ro"] for block in blocks] == [True]
