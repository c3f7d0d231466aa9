"""The sandbox: the containers of the guest and what they share."""

from __future__ import annotations

import _socket
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

from agent import cgroups, files, log, modules, mounts, oci, oom, storage
from agent.container import KILL_SECONDS, Container, check_id, remove_tree
from agent.errors import AgentError, AlreadyExists, WrongState, no_container
from agent.process import Ports
from agent.runtime import Crun

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.channel import Dispatcher
    from agent.reaper import Reaper
    from agent.schema import agent as messages

DEFAULT_ROOT = "/run/kata-containers"
BUNDLES = "bundles"  # a directory of their own, so that a container may be called "sandbox"
MAX_STALE = 1024  # entries of the share; beyond, the oldest wait for the kernel to want memory
MAX_HOSTNAME = 64  # linux/utsname.h, __NEW_UTS_LEN
RESOLV_CONF = "/etc/resolv.conf"


class Sandbox:
    """All containers, their storages, and the events that the host polls for."""

    def __init__(self, root: str, reaper: Reaper, dispatcher: Dispatcher, *, pipe_size: int) -> None:
        self.root = root
        self.id = ""
        self.reaper = reaper
        self.storages = storage.Storages()
        self._dispatcher = dispatcher
        self._pipe_size = pipe_size
        self._crun = Crun(reaper, f"{root}/crun")
        self._lock = threading.Lock()
        self._containers: dict[str, Container] = {}
        self._shared_pid_namespace = ""
        self._stale: deque[str] = deque(maxlen=MAX_STALE)  # what removed containers had in the share
        self._ooms: deque[str] = deque()
        self._oom_changed = threading.Condition()
        self._oom_waits = 0  # calls so far
        self._oom = oom.Watcher(self.report_oom)
        self._destroyed = False
        self._dns_mounted = False
        self.on_destroyed: Callable[[], None] | None = None  # called after the host has its answer

    # The sandbox itself

    def create(self, request: messages.CreateSandboxRequest) -> None:
        """Prepare the guest for containers."""
        with self._lock:
            if self.id:
                raise AlreadyExists(f'sandbox "{self.id}" is already created')
            self.id = request.sandbox_id or "sandbox"
            self._destroyed = False
        try:
            os.makedirs(f"{self.root}/sandbox", exist_ok=True)
            if request.hostname:
                _socket.sethostname(request.hostname[:MAX_HOSTNAME])
            for module in request.kernel_modules:
                self.reaper.run([modules.MODPROBE, "-v", module.name, *module.parameters])
            for entry in request.storages:
                self.storages.add(entry)
            self._set_dns(list(request.dns))
        except BaseException:
            self.storages.release_all()
            self.id = ""
            raise

    def _set_dns(self, lines: list[str]) -> None:
        if not lines:
            return
        path = f"{self.root}/sandbox/resolv.conf"
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        # In a guest of ours, the one is a link to the other.
        if os.path.exists(RESOLV_CONF) and not os.path.samefile(path, RESOLV_CONF):
            mounts.mount(path, RESOLV_CONF, "bind")
            self._dns_mounted = True

    def destroy(self) -> None:
        """Remove all containers and give everything back. Goes on when a step fails.

        If the machine is turned off after that, ending the processes and writing out what they wrote is
        enough, and faster.
        """
        if self.on_destroyed is not None:
            self._end_processes()
        else:
            self._remove_everything()
        with self._oom_changed:
            self._destroyed = True
            self._oom_changed.notify_all()
        self.id = ""

    def _end_processes(self) -> None:
        with self._lock:
            containers = list(self._containers.values())
        for container in containers:
            container.kill_all()
        for container in containers:
            if not container.wait_ended():
                log.warning("container does not end", container=container.id)
        os.sync()  # a page that was written through a mapping is in this kernel alone until now

    def _remove_everything(self) -> None:
        with self._lock:
            containers = list(self._containers)
        for container_id in containers:
            try:
                self.remove_container(container_id)
            except (AgentError, OSError) as exc:
                log.warning("container left behind", container=container_id, error=exc)
        self.storages.release_all()
        if self._dns_mounted:
            mounts.unmount(RESOLV_CONF)
            self._dns_mounted = False
        remove_tree(f"{self.root}/sandbox")

    def forget_stale_mounts(self) -> None:
        """Look at what is mounted in the share, and at what removed containers had there: the kernel drops
        what the host has removed when it is asked.
        """
        share = f"{self.root}/{files.SHARE}/"
        with self._lock:
            stale = list(self._stale)
        gone = [path for path in stale if mounts.is_removed(path)]
        with self._lock:  # the host is about to remove the others, and calls again
            for path in gone:
                if path in self._stale:  # or another call was faster
                    self._stale.remove(path)
        for entry in mounts.mounted():
            if entry.target.startswith(share):
                try:
                    os.stat(entry.target)
                except OSError:
                    pass  # that is what it was asked for

    # Containers

    def container(self, container_id: str) -> Container:
        """Return a container by its id.

        Raises:
            NotFound: there is none.
        """
        with self._lock:
            found = self._containers.get(container_id)
        if found is None:
            raise no_container(container_id)
        return found

    def containers(self) -> list[Container]:
        """Return all containers, the oldest first."""
        with self._lock:
            return list(self._containers.values())

    def create_container(self, request: messages.CreateContainerRequest) -> None:
        """Make a container, which waits for its start. A failure leaves nothing behind."""
        container_id = request.container_id
        check_id(container_id)
        container = Container(
            container_id,
            f"{self.root}/{BUNDLES}/{container_id}",
            self._crun,
            self._oom,
            pipe_size=self._pipe_size,
        )
        with self._lock:
            if container_id in self._containers or os.path.exists(container.bundle):
                raise AlreadyExists(f'container "{container_id}" already exists')
            self._containers[container_id] = container
        with container.lock:
            try:
                self._create(container, request)
            except BaseException:
                self._undo(container)
                raise

    def _create(self, container: Container, request: messages.CreateContainerRequest) -> None:
        spec = request.OCI
        container.init_names.add(request.exec_id)
        os.makedirs(container.bundle)
        if request.devices:
            from agent import devices

            devices.prepare(request.devices, spec)
        for entry in request.storages:
            self.storages.add(entry)
            container.storages.append(entry.mount_point)
        for name, value in oci.net_sysctls(spec).items():
            with open(f"/proc/sys/{name}", "w", encoding="utf-8") as file:
                file.write(value)
        root = os.path.join(container.bundle, spec.Root.Path)
        self._keep_submounts(container, [root, *(entry.source for entry in spec.Mounts)])
        config = oci.config(
            spec,
            root=root,
            namespaces=self._namespaces(shared_pid=request.sandbox_pidns),
            cgroups_path=oci.cgroups_path(spec.Linux.CgroupsPath, container.id),
        )
        ports = Ports(self._dispatcher, request.stdin_port, request.stdout_port, request.stderr_port)
        container.create(config, spec, ports, pivot=not mounts.root_is_initramfs())
        if request.sandbox_pidns and not self._shared_pid_namespace and container.init is not None:
            self._shared_pid_namespace = f"/proc/{container.init.pid}/ns/pid"

    def _namespaces(self, *, shared_pid: bool) -> dict[str, str]:
        """Return the namespaces to join: those of the sandbox are the agent's own, which it shares with
        nobody.
        """
        pid = os.getpid()
        joined = {"ipc": f"/proc/{pid}/ns/ipc", "uts": f"/proc/{pid}/ns/uts", "pid": ""}
        if cgroups.is_unified():
            joined["cgroup"] = ""  # else the container would see, and take for its own, the guest's root
        if shared_pid:
            joined["pid"] = self._shared_pid_namespace
        return joined

    def _keep_submounts(self, container: Container, paths: list[str]) -> None:
        for path in paths:
            if path.startswith(f"{self.root}/{files.SHARE}/"):
                mounts.keep_submount(path)
                container.submounts.append(path)

    def _undo(self, container: Container) -> None:
        try:
            container.destroy()
        except (AgentError, OSError) as exc:
            log.warning("failed creation is not undone completely", container=container.id, error=exc)
        self._forget(container)

    def remove_container(self, container_id: str, timeout: float = 0) -> None:
        """Kill and remove a container, with its storages. It is gone from the table in any case.

        `timeout` is how many seconds killed processes may take to be gone; 0 leaves it to us.
        """
        container = self.container(container_id)
        with container.lock:
            try:
                container.destroy(timeout or KILL_SECONDS)
            finally:
                self._forget(container)

    def _forget(self, container: Container) -> None:
        with self._lock:
            if self._containers.get(container.id) is not container:
                return
            del self._containers[container.id]
        init = container.init
        if init is not None and self._shared_pid_namespace == f"/proc/{init.pid}/ns/pid":
            self._shared_pid_namespace = ""
        share = f"{self.root}/{files.SHARE}/"
        mounts.drop_namespace(container.namespace, share)
        container.namespace = -1
        for path in container.submounts:
            mounts.drop_submount(path)
        # What lies directly in the share: the host removes it with all below.
        entries = {share + path.removeprefix(share).partition("/")[0] for path in container.submounts}
        with self._lock:
            self._stale.extend(entries)
        container.submounts.clear()
        for mount_point in reversed(container.storages):
            self.storages.release(mount_point)
        container.storages.clear()

    # Events

    def report_oom(self, container_id: str) -> None:
        """Note that the kernel has killed something in the container for want of memory."""
        with self._oom_changed:
            self._ooms.append(container_id)
            self._oom_changed.notify_all()

    def wait_oom(self) -> str:
        """Wait for the next such event; returns the container's id.

        A newer wait ends this one: the host that made it may be gone, and must not take the event with it.

        Raises:
            WrongState: the sandbox is gone, or somebody else waits now.
        """
        with self._oom_changed:
            self._oom_waits += 1
            mine = self._oom_waits
            self._oom_changed.notify_all()
            while not self._ooms:
                if self._destroyed:
                    raise WrongState("no more events: the sandbox is destroyed")
                self._oom_changed.wait()
                if self._oom_waits != mine:
                    raise WrongState("a newer call waits for these events")
            return self._ooms.popleft()
