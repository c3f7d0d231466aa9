"""The process that keeps VMs ready: boots or restores them, lets them wait paused, and gives each away once.

A VM that waits costs memory and no processor time: its agent has answered and was hung up on, what every pod
asks of it was done once, and its virtual processors are stopped. It is then no task and no connection, only a
handful of descriptors (`vc.hypervisor.parked`), and giving it away is sending these (`vc.factory.handover`).

The rules: never more than `size` VMs exist that nobody has, the one that is being made included; one is made
at a time, at a low priority; and none is left when this process ends, in whatever way, because their
keepers see to it (`vc.hypervisor.lease`).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vc.background import background
from vc.errors import AlreadyExists, VCError
from vc.factory import Factory
from vc.factory.handover import (
    MAX_REQUEST,
    NO_REQUEST,
    NO_SUCH,
    NONE_READY,
    OTHER_CONFIGURATION,
    handover_path,
    parse_wanted_untrusted,
    peer_uid,
    send_refusal,
    send_vm,
)
from vc.factory.warmup import warm_up
from vc.hypervisor.base import VMConfig
from vc.hypervisor.children import wait_exited
from vc.hypervisor.parked import Parked
from vc.persist.store import Layout, make_private
from vc.unixsock import connect_nowait, listen

log = logging.getLogger(__name__)

PROMISE = 10.0  # seconds to fetch a VM that was promised
REFILL_DELAY = 2.0  # seconds that the pod which took a VM is given for its own start
RETRY_FIRST, RETRY_MAX = 5.0, 300.0  # seconds until a VM that could not be made is tried again
REQUEST_TIMEOUT = 5.0  # seconds for a client that has connected to say what it wants
ACCEPT_PAUSE = 0.5  # seconds, after a client could not be accepted
END_GRACE = 5.0  # seconds for all VMs to be gone
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # Kata's


@dataclass(slots=True, eq=False)
class _Waiting:
    """A VM that nobody has."""

    parked: Parked
    watch: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(frozen=True, slots=True)
class Offer:
    """A VM that exists, in numbers."""

    vmid: str
    pid: int


class Pool:
    """The VMs that wait. It opens no socket; see `CacheServer`."""

    def __init__(self, factory: Factory, config: VMConfig, size: int) -> None:
        """`factory` gives VMs that can be parked. `config` is that of each."""
        self.config = config
        self._factory = factory
        self._size = size
        self._vms = Layout(config.run_dir).vms
        self._ready: list[_Waiting] = []
        self._promised: dict[str, _Waiting] = {}
        self._changed = trio.Event()
        self._given_away = False  # one was, since the last one was made
        self._nursery: trio.Nursery | None = None

    def offers(self) -> list[Offer]:
        """List the VMs that nobody has."""
        return [Offer(one.parked.vmid, one.parked.pid) for one in [*self._ready, *self._promised.values()]]

    async def fill(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep the pool filled until cancelled, and leave nothing; started when the first VM is ready.

        Raises: VCError, if not even the first one can be made.
        """
        async with background() as nursery:
            self._nursery = nursery
            try:
                await self._make()
                task_status.started()
                await self._refill()
            finally:
                await self._end_all()

    async def _refill(self) -> None:
        retry = RETRY_FIRST
        while True:
            while len(self._ready) + len(self._promised) >= self._size:
                await self._wait_change()
            if self._given_away:
                self._given_away = False
                await trio.sleep(REFILL_DELAY)
            try:
                await self._make()
                retry = RETRY_FIRST
            except VCError as exc:
                log.error("no VM can be made ready, next try in %.0f s: %s", retry, exc)
                await trio.sleep(retry)
                retry = min(2 * retry, RETRY_MAX)

    async def _wait_change(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    async def _make(self) -> None:
        vmid = secrets.token_hex(8)
        began = trio.current_time()
        log.info("VM %s is being made ready", vmid)
        async with self._factory.vm(self.config, vmid=vmid, netns="", shared_dir=None) as vm:
            # Also if it was restored: an emulator has translated nothing of it yet.
            await warm_up(vm.agent, vm.details)
            waiting = _Waiting(await vm.park())
            self._ready.append(waiting)
        assert self._nursery is not None
        self._nursery.start_soon(self._watch, waiting)
        took = trio.current_time() - began
        log.info("VM %s is ready after %.1f s: %d of %d", vmid, took, len(self._ready), self._size)

    async def _watch(self, waiting: _Waiting) -> None:
        """Notice that a VM died before anybody wanted it."""
        if waiting.watch.cancel_called:
            return  # it was given away before this task ran
        pidfd = os.dup(waiting.parked.pidfd)  # the VM's own one is closed when it is given away
        try:
            with waiting.watch:
                await wait_exited(pidfd)
                log.warning("VM %s died while it waited", waiting.parked.vmid)
                self._drop(waiting)
        finally:
            os.close(pidfd)

    def _drop(self, waiting: _Waiting) -> None:
        """Let go of a VM: if it lives, it is killed."""
        if waiting in self._ready:
            self._ready.remove(waiting)
        self._promised.pop(waiting.parked.vmid, None)
        waiting.watch.cancel()
        waiting.parked.close()
        shutil.rmtree(self._vms / waiting.parked.vmid, ignore_errors=True)
        self._changed.set()

    def promise(self) -> Offer | None:
        """Put a VM aside for whoever comes with its name in time; None if none is ready."""
        if not self._ready or self._nursery is None:
            return None
        waiting = self._ready.pop(0)
        vmid = waiting.parked.vmid
        self._promised[vmid] = waiting
        self._nursery.start_soon(self._expire, vmid)
        return Offer(vmid, waiting.parked.pid)

    async def _expire(self, vmid: str) -> None:
        await trio.sleep(PROMISE)
        if waiting := self._promised.get(vmid):
            log.warning("VM %s was promised and not fetched within %g s: it is ended", vmid, PROMISE)
            self._drop(waiting)

    def give(self, connection: socket.socket, vmid: str = "") -> bool:
        """Send a VM, the one of this name if it has one; False if there is none. Does not block.

        Raises: OSError: it could not be sent and is still here.
        """
        waiting = self._promised.get(vmid) if vmid else next(iter(self._ready), None)
        if waiting is None:
            return False
        send_vm(connection, waiting.parked)
        if vmid:
            del self._promised[vmid]
        else:
            self._ready.remove(waiting)
        waiting.watch.cancel()
        waiting.parked.close()  # the other side has it
        self._given_away = True
        self._changed.set()
        log.info("VM %s was given away; %d are ready", waiting.parked.vmid, len(self._ready))
        return True

    async def _end_all(self) -> None:
        """Let go of all VMs, and wait until they are gone."""
        pidfds = []
        for waiting in [*self._ready, *self._promised.values()]:
            pidfds.append(os.dup(waiting.parked.pidfd))
            self._drop(waiting)
        with trio.move_on_after(END_GRACE, shield=True):
            for pidfd in pidfds:
                await wait_exited(pidfd)
        for pidfd in pidfds:
            os.close(pidfd)


async def hand_over(listener: socket.socket, pool: Pool, key: str) -> None:
    """Answer takers until cancelled. `key`: see `cache_key`."""
    accepting = trio.socket.from_stdlib_socket(listener)
    async with background() as nursery:
        while True:
            try:
                connection, _ = await accepting.accept()
            except OSError as exc:  # no descriptor is free, or no memory: that passes
                log.warning("a client was not heard: %s", exc.strerror)
                await trio.sleep(ACCEPT_PAUSE)
                continue
            nursery.start_soon(_answer, connection, pool, key)


async def _answer(connection: trio.socket.SocketType, pool: Pool, key: str) -> None:
    with connection, suppress(OSError):  # whoever has gone needs no answer
        data = b""
        with trio.move_on_after(REQUEST_TIMEOUT):
            data = await connection.recv(MAX_REQUEST)
        plain = socket.socket(fileno=os.dup(connection.fileno()))  # sending must not be interrupted
        with plain:
            uid = peer_uid(plain)
            if uid not in (0, os.geteuid()):
                log.warning("user %d asked for a VM and got none", uid)
                return
            if why := _give(plain, data, pool, key):
                send_refusal(plain, why)


def _give(connection: socket.socket, data: bytes, pool: Pool, key: str) -> str:
    """Give what is asked for; return why not. Raises: OSError."""
    wanted = parse_wanted_untrusted(data)
    if wanted is None:
        return NO_REQUEST
    if wanted.vmid:
        return "" if pool.give(connection, wanted.vmid) else NO_SUCH
    if wanted.key != key:
        return OTHER_CONFIGURATION
    return "" if pool.give(connection) else NONE_READY


def listen_at(stack: ExitStack, endpoint: Path) -> socket.socket:
    """Listen for takers; `stack` ends that. The endpoint itself is left to whoever serves there.

    Raises: AlreadyExists, VCError.
    """
    if endpoint.exists():  # the text is Kata's
        raise AlreadyExists(
            f"{endpoint} already exist.  Please stop running VMCache server and remove {endpoint}"
        )
    path = handover_path(endpoint)
    try:
        make_private(endpoint.parent)
        if path.is_socket():
            _check_unused(path)
            path.unlink()
        listener = listen(path, socket.SOCK_SEQPACKET)
    except OSError as exc:
        raise VCError(f"cannot hand over VMs at {str(path)!r}: {exc.strerror}") from exc
    stack.callback(path.unlink, missing_ok=True)
    return stack.enter_context(listener)


def _check_unused(path: Path) -> None:
    try:
        connect_nowait(path, socket.SOCK_SEQPACKET).close()
    except ConnectionRefusedError:
        return
    raise AlreadyExists(f"another process hands over VMs at {str(path)!r}")


async def run_cache(pool: Pool, key: str, endpoint: Path, *, on_ready: Callable[[], None]) -> None:
    """Keep VMs and give them away until somebody says Quit, or SIGTERM or SIGINT comes; then leave nothing.

    `on_ready` is called when the first one is ready. `key`: see `cache_key`.

    Raises:
        AlreadyExists: one runs already.
        VCError: not even the first VM can be made.

    """
    from vc.factory.cachedoor import door  # half of the imports of this process; the pool needs none of them

    with (
        ExitStack() as stack,
        trio.open_signal_receiver(*STOP_SIGNALS) as signals,
        trio.CancelScope() as life,
    ):
        listener = listen_at(stack, endpoint)
        async with background() as nursery:
            nursery.start_soon(_end_on_signal, signals, life)
            nursery.start_soon(hand_over, listener, pool, key)
            async with door(endpoint, pool, key, on_quit=life.cancel):
                await nursery.start(pool.fill)
                on_ready()
                await trio.sleep_forever()


async def _end_on_signal(signals: AsyncIterator[int], life: trio.CancelScope) -> None:
    async for number in signals:
        log.info("ending by %s", signal.Signals(number).name)
        life.cancel()
