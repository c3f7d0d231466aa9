"""Start-up of the agent: as process 1 of a guest, or on a host where it serves a unix socket.

agent                                    in a guest: makes it a system, serves virtio port and vsock
agent --listen unix:PATH [--root DIR]    on a host, in PID, mount, IPC and UTS namespaces of its own
agent --version
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from agent import lightproto, log

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.channel import Dispatcher
    from agent.sandbox import Sandbox

USAGE = "usage: agent [--version] [--listen unix:PATH] [--root DIR]"

STACK_SIZE = 512 << 10  # bytes of a thread
# For the virtio port to appear: Kata 1.x waits for it 200 times 50 ms.
CHANNEL_TRIES, CHANNEL_INTERVAL = 200, 0.05


class Usage(Exception):
    """The command line makes no sense."""


class Arguments:
    """The command line."""

    def __init__(self, argv: list[str]) -> None:
        self.version = False
        self.listen = ""
        self.root = ""
        rest = list(argv)
        while rest:
            option = rest.pop(0)
            if option == "--version":
                self.version = True
            elif option == "--listen" and rest and rest[0].startswith("unix:"):
                self.listen = rest.pop(0).removeprefix("unix:")
            elif option == "--root" and rest:
                self.root = rest.pop(0)
            else:
                raise Usage(f"cannot use {option!r}")


def main(argv: list[str] | None = None) -> int:
    """Run the agent; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    # The kernel gives process 1 the words of its command line that it does not know.
    if os.getpid() == 1 and "--listen" not in given:
        return run_guest()
    try:
        arguments = Arguments(given)
        if not arguments.listen and not arguments.version:
            raise Usage("nowhere to listen: only as process 1 the agent finds that out by itself")
    except Usage as exc:
        sys.stderr.write(f"agent: {exc}\n{USAGE}\n")
        return 2
    if arguments.version:
        from agent.version import VERSION

        sys.stdout.write(f"agent {VERSION}\n")
        return 0
    run_host(arguments.listen, arguments.root)
    return 0


def run_host(path: str, root: str) -> None:
    """Serve a unix socket until the process is ended."""
    from agent import channel

    log.install_hooks()
    lightproto.install()
    from agent import cgroups, syscalls

    if os.getpid() != 1:
        syscalls.become_subreaper()
    elif cgroups.is_hybrid():
        # Ours to change: process 1 here means namespaces of its own.
        syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.unmount(cgroups.HYBRID)
    _, dispatcher = build(root, {})
    listener = channel.listen_unix(path)
    log.info("ready", listen=path)
    channel.accept_all(listener, dispatcher.serve)


def run_guest() -> int:
    """Be process 1. Whatever happens, the machine is turned off instead of left without one."""
    from agent import guest

    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    log.install_hooks()
    try:
        parameters = guest.prepare()
        prepared = time.clock_gettime(time.CLOCK_BOOTTIME)
        lightproto.install()
        sandbox, dispatcher = build("", parameters)
        sandbox.on_destroyed = guest.power_off
        from agent import modules

        modules.reaper = sandbox.reaper
        serve_guest(dispatcher, lambda: _log_times(began, prepared))
    except BaseException as exc:
        log.exception("the agent cannot go on", exc)
    guest.power_off()
    return 1


def _log_times(began: float, prepared: float) -> None:
    ready = time.clock_gettime(time.CLOCK_BOOTTIME)
    log.info("ready", began=f"{began:.3f}", prepared=f"{prepared:.3f}", serving=f"{ready:.3f}")


def serve_guest(dispatcher: Dispatcher, ready: Callable[[], None]) -> None:
    """Serve what the machine has: vsock, the virtio port, or both."""
    from agent import channel, threads

    for _ in range(CHANNEL_TRIES):
        port, vsock = channel.find_port(), os.path.exists("/dev/vsock")
        if port or vsock:
            break
        time.sleep(CHANNEL_INTERVAL)  # nothing tells when a port has got its name
    else:
        raise RuntimeError(f"the machine has neither vsock nor a virtio port named {channel.PORT_NAME}")
    if vsock:
        dispatcher.vsock = True
        listener = channel.listen_vsock(channel.RPC_PORT)
        threads.start("vsock", channel.accept_all, listener, dispatcher.serve_rpc)
    ready()
    if port:
        channel.serve_port(port, dispatcher)
    threading.Event().wait()


def build(root: str, parameters: dict[str, str]) -> tuple[Sandbox, Dispatcher]:
    """Put the agent together. `parameters` are those of the kernel command line, if it is ours."""
    from agent import channel, schema, service, stdio, uevents
    from agent.guest import number
    from agent.reaper import Reaper
    from agent.sandbox import DEFAULT_ROOT, Sandbox
    from agent.server import Server
    from ttrpc import methods

    threading.stack_size(STACK_SIZE)
    pipe_size = int(number(parameters, "agent.container_pipe_size", stdio.DEFAULT_PIPE_SIZE))
    uevents.hotplug_timeout = number(parameters, "agent.hotplug_timeout", uevents.hotplug_timeout)
    reaper = Reaper()
    reaper.start()
    dispatcher = channel.Dispatcher()
    sandbox = Sandbox(root or DEFAULT_ROOT, reaper, dispatcher, pipe_size=pipe_size)
    agent_table = methods.service(schema.agent.DESCRIPTOR.services_by_name["AgentService"])
    health_table = methods.service(schema.health.DESCRIPTOR.services_by_name["Health"])
    server = Server(
        {
            "grpc.AgentService": (agent_table, service.AgentService(sandbox, dispatcher)),
            "grpc.Health": (health_table, service.Health()),
        }
    )
    dispatcher.serve_rpc = server.serve
    return sandbox, dispatcher
