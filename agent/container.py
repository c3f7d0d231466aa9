"""One container: its bundle, its processes, its states.

`lock` is held by whatever changes the container as a whole, so an update or a signal that arrives while it
is being created or removed waits for that. Waiting for a process, its streams and single signals do not
take it.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from agent import cgroups, jsontext, mounts, oci, process
from agent.errors import AlreadyExists, InvalidArgument, RuntimeFailed, WrongState, no_exec

if TYPE_CHECKING:
    from agent.oom import Watcher
    from agent.process import Ports, Process
    from agent.runtime import Crun
    from agent.schema import agent as messages
    from agent.schema import oci as oci_messages

CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"

SIGTERM, SIGKILL = 15, 9
KILL_SECONDS = 10.0  # for a killed process to be gone: one in the kernel can take its time
TERMINATION_LOG_PATH = "io.kubernetes.container.terminationMessagePath"
MAX_TERMINATION_LOG = 4096  # Kubernetes' limit, in bytes
MAX_ENDED_EXECS = 256  # whose exit is remembered for a late or repeated WaitProcess

_ID_START = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_ID_REST = _ID_START | frozenset("_.-")


def check_id(container_id: str) -> None:
    """Refuse an id that could not be a file's name: Kata's rule.

    Raises:
        InvalidArgument: it is one.
    """
    if len(container_id) < 2 or container_id[0] not in _ID_START or not _ID_REST.issuperset(container_id):
        raise InvalidArgument(f'invalid container id "{container_id}": letters, digits and "_.-" are allowed')


class Container:
    """A container and its processes. Made by `Sandbox.create_container`."""

    def __init__(self, container_id: str, bundle: str, crun: Crun, oom: Watcher, *, pipe_size: int) -> None:
        self.id = container_id
        self.bundle = bundle
        self.lock = threading.RLock()
        self.state = CREATING
        self.init_names = {"", container_id}  # what calls may name the init process by
        self.spec: oci_messages.Spec | None = None
        self.storages: list[str] = []  # mount points, in the order of their mounting
        self.submounts: list[str] = []  # directories of the share: see `mounts.keep_submount`
        self.namespace = -1  # of its mounts: see `mounts.hold_namespace`
        self.cgroup = cgroups.Cgroup({})
        self.init: Process | None = None
        self._execs: dict[str, Process] = {}
        self._state_lock = threading.Lock()  # of `state`; held for moments only
        self._table_lock = threading.Lock()  # of `_execs`; held for moments only
        self._crun = crun
        self._oom = oom
        self._pipe_size = pipe_size

    # Making

    def create(self, config: oci.Json, spec: oci_messages.Spec, ports: Ports, *, pivot: bool) -> None:
        """Make the container and its init process, which waits for `start`."""
        self.spec = spec
        with open(f"{self.bundle}/config.json", "w", encoding="utf-8") as file:
            file.write(jsontext.encode(config))
        self.init = process.launch(
            lambda streams, console: self._crun.create(
                self.id, self.bundle, streams, console=console, pivot=pivot
            ),
            ports,
            directory=self.bundle,
            terminal=bool(spec.Process.Terminal),
            uid=spec.Process.User.UID,
            pipe_size=self._pipe_size,
        )
        self.namespace = mounts.hold_namespace(self.init.pid)
        self.cgroup = cgroups.of_process(self.init.pid)
        self._move(CREATING, CREATED)
        self.init.on_end(self._init_ended)
        self._oom.add(self.id, self.cgroup)

    def _init_ended(self, _status: int) -> None:
        with self._state_lock:
            self.state = STOPPED
        self._oom.check(self.id)

    def start(self) -> None:
        """Run the program."""
        with self.lock:
            self.require(CREATED, doing="start")
            self._crun.start(self.id)
            self._move(CREATED, RUNNING)

    def _move(self, old: str, new: str) -> None:
        """Change the state, unless the container has ended meanwhile, which the reaper's thread tells."""
        with self._state_lock:
            if self.state == old:
                self.state = new

    def exec(self, exec_id: str, message: oci_messages.Process, ports: Ports) -> None:
        """Run one more process. Its id is free again once its exit has been told to somebody."""
        with self.lock:
            try:
                self.require(RUNNING, CREATED, doing="exec in")
                self._free_exec_id(exec_id)
            except BaseException:
                ports.close()
                raise
            directory = f"{self.bundle}/exec"
            os.makedirs(directory, exist_ok=True)  # one at a time, under the lock
            capabilities = self.spec.Process.Capabilities if self.spec is not None else None
            with open(f"{directory}/process.json", "w", encoding="utf-8") as file:
                file.write(jsontext.encode(oci.process(message, capabilities=capabilities)))
            started = process.launch(
                lambda streams, console: self._crun.exec(
                    self.id, directory, f"{directory}/process.json", streams, console=console
                ),
                ports,
                directory=directory,
                terminal=bool(message.Terminal),
                uid=message.User.UID,
                pipe_size=self._pipe_size,
            )
            with self._table_lock:
                self._execs[exec_id] = started

    def _free_exec_id(self, exec_id: str) -> None:
        """Make room for a new exec: drop the one of the same name, or the oldest of too many, if it is
        over.
        """
        with self._table_lock:
            known = self._execs.get(exec_id)
            if exec_id in self.init_names or (known is not None and not (known.ended and known.waited)):
                raise AlreadyExists(f"exec_id '{exec_id}' already exists")
            gone = [known] if known is not None else []
            self._execs.pop(exec_id, None)
            over = [name for name, old in self._execs.items() if old.ended and old.waited]
            gone += [self._execs.pop(name) for name in over[: max(0, len(over) - MAX_ENDED_EXECS)]]
        for old in gone:
            old.close()

    # Looking

    def require(self, *states: str, doing: str) -> None:
        """Raise WrongState unless the container is in one of these states."""
        if self.state not in states:
            raise WrongState(f'cannot {doing} container "{self.id}": it is {self.state}')

    def process(self, exec_id: str) -> Process:
        """Return a process by its name.

        Raises:
            NotFound: there is none.
        """
        if exec_id in self.init_names:
            if self.init is None:
                raise no_exec(self.id, exec_id)
            return self.init
        with self._table_lock:
            found = self._execs.get(exec_id)
        if found is None:
            raise no_exec(self.id, exec_id)
        return found

    # Changing

    def signal(self, exec_id: str, signal: int) -> None:
        """Send a signal. SIGKILL without an exec id is for all processes, every other signal for one.

        An init process that has not arranged for SIGTERM would not notice it, for the kernel protects the
        first process of a namespace: it gets SIGKILL instead.
        """
        if signal == SIGKILL and not exec_id:
            with self.lock:
                self.kill_all()
            return
        target = self.process(exec_id)
        if signal == SIGTERM and target is self.init and not _notices(target.pid, signal):
            signal = SIGKILL
        target.kill(signal)

    def kill_all(self) -> None:
        """Kill every process of the container; frozen ones too. Does not wait."""
        if self.init is not None:
            self.cgroup.kill()
            self.init.kill(SIGKILL)

    def wait_ended(self) -> bool:
        """Wait a moment for a killed init process; whether it has ended."""
        return self.init is None or self.init.wait(KILL_SECONDS) is not None

    def update(self, limits: oci.Json) -> None:
        """Change limits. Those that are not given stay as they are."""
        with self.lock:
            self.require(CREATED, RUNNING, PAUSED, doing="update")
            if not limits:
                return
            path = f"{self.bundle}/resources.json"
            with open(path, "w", encoding="utf-8") as file:
                file.write(jsontext.encode(limits))
            self._crun.update(self.id, path)

    def pause(self) -> None:
        """Freeze."""
        with self.lock:
            self.require(RUNNING, doing="pause")
            self._crun.pause(self.id)
            self._move(RUNNING, PAUSED)

    def resume(self) -> None:
        """Thaw."""
        with self.lock:
            self.require(PAUSED, doing="resume")
            self._crun.resume(self.id)
            self._move(PAUSED, RUNNING)

    def stats(self) -> messages.CgroupStats:
        """Return what the cgroup has counted."""
        return self.cgroup.stats()

    def termination_log(self) -> str:
        """Return what the container wrote as its last words, at most MAX_TERMINATION_LOG bytes."""
        spec = self.spec
        inside = spec.Annotations.get(TERMINATION_LOG_PATH, "") if spec is not None else ""
        for entry in spec.Mounts if spec is not None and inside else ():
            if entry.destination == inside:
                try:
                    with open(entry.source, "rb") as file:
                        return file.read(MAX_TERMINATION_LOG).decode("utf-8", "replace")
                except OSError:
                    break
        return ""

    def destroy(self, timeout: float = KILL_SECONDS) -> None:
        """Kill what runs, and remove the container and all we know of it. Goes on when a step fails.

        Raises:
            RuntimeFailed: something is left; the text says what.
        """
        problems: list[str] = []
        with self.lock:
            self.kill_all()
            self._oom.remove(self.id)
            if self.init is not None and self.init.wait(timeout) is None:
                problems.append(f"init process {self.init.pid} did not end within {timeout:g} s (ETIME)")
            try:
                self._crun.delete(self.id)
            except RuntimeFailed as exc:
                problems.append(str(exc))
            self.state = STOPPED
            with self._table_lock:
                processes = [*self._execs.values(), *([self.init] if self.init is not None else [])]
            for item in processes:
                item.close()
            remove_tree(self.bundle)
        if problems:
            raise RuntimeFailed(f'container "{self.id}" is not removed completely: {"; ".join(problems)}')


def _notices(pid: int, signal: int) -> bool:
    """Whether a process blocks, ignores or catches a signal, by the masks in its status file."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return True  # it has ended
    bit = 1 << (signal - 1)
    masks = [line.split()[1] for line in lines if line.startswith(("SigBlk:", "SigIgn:", "SigCgt:"))]
    return any(int(mask, 16) & bit for mask in masks)


def remove_tree(path: str) -> None:
    """Remove a directory of ours and what is in it. Mounts below must be gone; links are not followed."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(path)
