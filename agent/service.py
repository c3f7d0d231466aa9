"""The methods of grpc.AgentService and grpc.Health, a few lines each; the work is elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import oci, schema
from agent.errors import InvalidArgument
from agent.process import Ports
from agent.schema import EMPTY
from agent.version import VERSION

if TYPE_CHECKING:
    from agent.channel import Dispatcher
    from agent.sandbox import Sandbox
    from agent.schema import Empty, health
    from agent.schema import agent as messages

API_VERSION = "0.0.1"  # what Kata's agent answers as grpc_version
FEATURES = ("stdio-streams",)
MAX_READ = 1 << 20  # bytes of one Read call, whatever the host asks for


class Health:
    """Whether the agent is there, and what it is."""

    def check(self, _request: health.CheckRequest) -> health.HealthCheckResponse:
        """Say that the agent serves."""
        return schema.health.HealthCheckResponse(status=schema.health.HealthCheckResponse.SERVING)

    def version(self, _request: health.CheckRequest) -> health.VersionCheckResponse:
        """Say which agent it is."""
        return schema.health.VersionCheckResponse(grpc_version=API_VERSION, agent_version=VERSION)


class AgentService:
    """The agent API; what has no method here is answered as unimplemented."""

    def __init__(self, sandbox: Sandbox, dispatcher: Dispatcher) -> None:
        self._sandbox = sandbox
        self._dispatcher = dispatcher

    # Containers and processes

    def create_container(self, request: messages.CreateContainerRequest) -> Empty:
        """Make a container and its init process, which waits for StartContainer."""
        self._sandbox.create_container(request)
        return EMPTY

    def start_container(self, request: messages.StartContainerRequest) -> Empty:
        """Run the container's program."""
        self._sandbox.container(request.container_id).start()
        return EMPTY

    def remove_container(self, request: messages.RemoveContainerRequest) -> Empty:
        """Kill what runs and remove the container."""
        self._sandbox.remove_container(request.container_id)
        return EMPTY

    def exec_process(self, request: messages.ExecProcessRequest) -> Empty:
        """Run one more process in a container."""
        if not request.exec_id:
            raise InvalidArgument("exec_id is empty: that is the name of the init process")
        container = self._sandbox.container(request.container_id)
        ports = Ports(self._dispatcher, request.stdin_port, request.stdout_port, request.stderr_port)
        container.exec(request.exec_id, request.process, ports)
        return EMPTY

    def signal_process(self, request: messages.SignalProcessRequest) -> Empty:
        """Send a signal to a process; SIGKILL without an exec id goes to all of the container."""
        self._sandbox.container(request.container_id).signal(request.exec_id, request.signal)
        return EMPTY

    def wait_process(self, request: messages.WaitProcessRequest) -> messages.WaitProcessResponse:
        """Wait for the end of a process. Any number may wait; the answer stays until the container is
        removed.
        """
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        status = process.wait()
        process.waited = True
        return schema.agent.WaitProcessResponse(
            status=status, stdout_bytes=process.written(1), stderr_bytes=process.written(2)
        )

    def update_container(self, request: messages.UpdateContainerRequest) -> Empty:
        """Change the limits that are given."""
        self._sandbox.container(request.container_id).update(oci.resources(request.resources))
        return EMPTY

    def pause_container(self, request: messages.PauseContainerRequest) -> Empty:
        """Freeze a container."""
        self._sandbox.container(request.container_id).pause()
        return EMPTY

    def resume_container(self, request: messages.ResumeContainerRequest) -> Empty:
        """Thaw a container."""
        self._sandbox.container(request.container_id).resume()
        return EMPTY

    # Standard streams

    def write_stdin(self, request: messages.WriteStreamRequest) -> messages.WriteStreamResponse:
        """Write to a process; no data means the end of its input."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        if request.data:
            process.stdio.stdin.write(request.data)
        else:
            process.stdio.stdin.end()
        return schema.agent.WriteStreamResponse(len=len(request.data))

    def read_stdout(self, request: messages.ReadStreamRequest) -> messages.ReadStreamResponse:
        """Wait for output; no data means the end of it."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        return schema.agent.ReadStreamResponse(data=process.stdio.stdout.read(_read_size(request)))

    def read_stderr(self, request: messages.ReadStreamRequest) -> messages.ReadStreamResponse:
        """Wait for output on the second stream; a terminal has none."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        stderr = process.stdio.stderr
        data = stderr.read(_read_size(request)) if stderr is not None else b""
        return schema.agent.ReadStreamResponse(data=data)

    def close_stdin(self, request: messages.CloseStdinRequest) -> Empty:
        """Give a process the end of its input."""
        self._sandbox.container(request.container_id).process(request.exec_id).stdio.stdin.end()
        return EMPTY

    def tty_win_resize(self, request: messages.TtyWinResizeRequest) -> Empty:
        """Tell a terminal its size."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        process.stdio.stdin.resize(request.row, request.column)
        return EMPTY

    # The sandbox

    def create_sandbox(self, request: messages.CreateSandboxRequest) -> Empty:
        """Prepare the guest."""
        self._sandbox.create(request)
        return EMPTY

    def destroy_sandbox(self, _request: messages.DestroySandboxRequest) -> Empty:
        """Remove everything."""
        self._sandbox.destroy()
        return EMPTY

    def answered(self, name: str) -> None:
        """Do what must wait until a call has been answered: a guest without a sandbox has no purpose."""
        if name == "DestroySandbox" and self._sandbox.on_destroyed is not None:
            self._sandbox.on_destroyed()


def _read_size(request: messages.ReadStreamRequest) -> int:
    return min(request.len or MAX_READ, MAX_READ)
