"""Start-up of the agent: as process 1 of a guest, or on a host where it serves a unix socket.

agent                              in a guest: mounts what a system needs, then serves virtio port and vsock
agent --listen unix:PATH [--root DIR]      on a host; in PID, mount, IPC and UTS namespaces of its own
agent --version
"""

from __future__ import annotations

import os
import sys
import threading

from agent import log

USAGE = "usage: agent [--version] [--listen unix:PATH] [--root DIR]"


def main(argv: list[str]) -> int:
    """Run the agent; returns the exit status."""
    listen = root = ""
    arguments = list(argv)
    while arguments:
        option = arguments.pop(0)
        if option == "--version":
            from agent.service import VERSION

            sys.stdout.write(f"agent {VERSION}\n")
            return 0
        if option in ("--listen", "--root") and arguments:
            value = arguments.pop(0)
            if option == "--root":
                root = value
            else:
                listen = value
        else:
            sys.stderr.write(f"{USAGE}\n")
            return 2
    if listen and not listen.startswith("unix:"):
        sys.stderr.write(f"agent: cannot listen on {listen}: only unix:PATH is known\n{USAGE}\n")
        return 2
    log.install_hooks()
    threading.stack_size(512 << 10)
    serve(listen.removeprefix("unix:"), root)
    return 0


def serve(path: str, root: str) -> None:
    """Serve until the process is ended."""
    from agent import channel, schema, service, stdio
    from agent.reaper import Reaper
    from agent.sandbox import DEFAULT_ROOT, Sandbox
    from agent.server import Server
    from ttrpc import methods

    reaper = Reaper()
    reaper.start()
    server: list[Server] = []
    dispatcher = channel.Dispatcher(lambda stream: server[0].serve(stream))
    sandbox = Sandbox(root or DEFAULT_ROOT, reaper, dispatcher, pipe_size=stdio.DEFAULT_PIPE_SIZE)
    agent_table = methods.service(schema.agent.DESCRIPTOR.services_by_name["AgentService"])
    health_table = methods.service(schema.health.DESCRIPTOR.services_by_name["Health"])
    server.append(
        Server(
            {
                "grpc.AgentService": (agent_table, service.AgentService(sandbox, dispatcher)),
                "grpc.Health": (health_table, service.Health()),
            }
        )
    )
    listener = channel.listen_unix(path)
    log.info("ready", listen=path, pid=os.getpid())
    channel.accept_all(listener, dispatcher.serve)
