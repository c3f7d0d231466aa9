"""The methods of grpc.AgentService and grpc.Health, a few lines each; the work is elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import oci, schema, system
from agent.errors import InvalidArgument
from agent.process import Ports
from agent.schema import EMPTY
from agent.version import VERSION

if TYPE_CHECKING:
    from agent.channel import Dispatcher
    from agent.sandbox import Sandbox
    from agent.schema import Empty, health, types
    from agent.schema import agent as messages

API_VERSION = "0.0.1"  # what Kata's agent answers as grpc_version
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
        self._sandbox.remove_container(request.container_id, request.timeout)
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

    def stats_container(self, request: messages.StatsContainerRequest) -> messages.StatsContainerResponse:
        """Say what a container uses. The network is the pod's: the guest has one."""
        from agent import network

        return schema.agent.StatsContainerResponse(
            cgroup_stats=self._sandbox.container(request.container_id).stats(),
            network_stats=network.statistics(),
        )

    def get_diagnostic_data(
        self, request: messages.GetDiagnosticDataRequest
    ) -> messages.GetDiagnosticDataResponse:
        """Return the termination log of a container; or (own) where this agent is, if something hangs."""
        if request.log_type == "stacks":
            from agent import stacks

            return schema.agent.GetDiagnosticDataResponse(data=stacks.collect(self._sandbox))
        if request.log_type != "termination_log":
            raise InvalidArgument(
                f'unknown log type "{request.log_type}": termination_log and stacks are known'
            )
        data = self._sandbox.container(request.container_id).termination_log()
        return schema.agent.GetDiagnosticDataResponse(data=data)

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

    def get_guest_details(self, request: messages.GuestDetailsRequest) -> messages.GuestDetailsResponse:
        """Say what this guest can do."""
        return system.details(block_size=request.mem_block_size, probe=request.mem_hotplug_probe)

    def get_metrics(self, _request: messages.GetMetricsRequest) -> messages.Metrics:
        """Say what the guest measures."""
        from agent import metrics

        return schema.agent.Metrics(metrics=metrics.collect())

    def get_oom_event(self, _request: messages.GetOOMEventRequest) -> messages.OOMEvent:
        """Wait until the kernel kills something in a container for want of memory."""
        return schema.agent.OOMEvent(container_id=self._sandbox.wait_oom())

    def online_cpu_mem(self, request: messages.OnlineCPUMemRequest) -> Empty:
        """Use processors and memory that were plugged in."""
        system.online(request.nb_cpus, memory=not request.cpu_only)
        return EMPTY

    def mem_hotplug_by_probe(self, request: messages.MemHotplugByProbeRequest) -> Empty:
        """Tell the kernel of plugged memory."""
        system.probe_memory(request.memHotplugProbeAddr)
        return EMPTY

    def reseed_random_dev(self, request: messages.ReseedRandomDevRequest) -> Empty:
        """Make random numbers unlike those of another guest from the same template."""
        system.reseed(request.data)
        return EMPTY

    def set_guest_date_time(self, request: messages.SetGuestDateTimeRequest) -> Empty:
        """Set the clock."""
        system.set_clock(request.Sec, request.Usec)
        return EMPTY

    # Storage

    def copy_file(self, request: messages.CopyFileRequest) -> Empty:
        """Take a piece of a file for the share."""
        from agent import files

        files.copy_file(self._sandbox.root, request)
        return EMPTY

    def update_ephemeral_mounts(self, request: messages.UpdateEphemeralMountsRequest) -> Empty:
        """Change the options, such as the size, of memory file systems."""
        for entry in request.storages:
            self._sandbox.storages.remount(entry)
        return EMPTY

    def remove_stale_virtiofs_share_mounts(
        self, _request: messages.RemoveStaleVirtiofsShareMountsRequest
    ) -> Empty:
        """Make the kernel notice what the host has taken out of the share."""
        self._sandbox.forget_stale_mounts()
        return EMPTY

    def add_swap(self, request: messages.AddSwapRequest) -> Empty:
        """Use a plugged disk as swap."""
        from agent import devices

        path = "/".join(f"{slot:02x}" for slot in request.PCIPath)
        system.swap_on(devices.block_device("blk", path))
        return EMPTY

    def add_swap_path(self, request: messages.AddSwapPathRequest) -> Empty:
        """Use a device as swap."""
        system.swap_on(request.path)
        return EMPTY

    def get_volume_stats(self, request: messages.VolumeStatsRequest) -> messages.VolumeStatsResponse:
        """Say how full a volume is."""
        return system.volume_stats(request.volume_guest_path)

    # Network

    def update_interface(self, request: messages.UpdateInterfaceRequest) -> types.Interface:
        """Make an interface what the host wants."""
        from agent import network

        return network.update_interface(request.interface)

    def list_interfaces(self, _request: messages.ListInterfacesRequest) -> messages.Interfaces:
        """Return all interfaces."""
        from agent import network

        return schema.agent.Interfaces(Interfaces=network.list_interfaces())

    def update_routes(self, request: messages.UpdateRoutesRequest) -> messages.Routes:
        """Add routes; returns all there are."""
        from agent import network

        return schema.agent.Routes(Routes=network.update_routes(request.routes.Routes))

    def list_routes(self, _request: messages.ListRoutesRequest) -> messages.Routes:
        """Return all routes."""
        from agent import network

        return schema.agent.Routes(Routes=network.list_routes())

    def add_arp_neighbors(self, request: messages.AddARPNeighborsRequest) -> Empty:
        """Add neighbours."""
        from agent import network

        network.add_neighbours(request.neighbors.ARPNeighbors)
        return EMPTY

    def get_ip_tables(self, request: messages.GetIPTablesRequest) -> messages.GetIPTablesResponse:
        """Return the rules of the packet filter."""
        data = system.iptables(self._sandbox.reaper, ipv6=request.is_ipv6)
        return schema.agent.GetIPTablesResponse(data=data)

    def set_ip_tables(self, request: messages.SetIPTablesRequest) -> messages.SetIPTablesResponse:
        """Set the rules of the packet filter."""
        data = system.iptables(self._sandbox.reaper, ipv6=request.is_ipv6, rules=request.data)
        return schema.agent.SetIPTablesResponse(data=data)

    def answered(self, name: str) -> None:
        """Do what must wait until a call has been answered: a guest without a sandbox has no purpose."""
        if name == "DestroySandbox" and self._sandbox.on_destroyed is not None:
            self._sandbox.on_destroyed()


def _read_size(request: messages.ReadStreamRequest) -> int:
    return min(request.len or MAX_READ, MAX_READ)
