"""Lifecycles of sandbox, container and process as tables: pure, the owners keep the state.

The words of sandbox and container are those of Kata's persisted records, and so are the error texts, because
operators search for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeVar

from vc.errors import WrongState


class SandboxState(StrEnum):
    """Where a sandbox is in its life."""

    READY = "ready"  # recorded; the VM may be booting
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class ContainerState(StrEnum):
    """Where a container is in its life."""

    READY = "ready"  # created, init not started
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class ProcessState(StrEnum):
    """Where a process is in its life."""

    CREATED = "created"
    STARTING = "starting"  # the guest has been asked
    RUNNING = "running"
    STOPPED = "stopped"


S = TypeVar("S", bound=StrEnum)

# Kata virtcontainers, types.StateString and validTransition.
SANDBOX_MOVES: Final[Mapping[SandboxState, frozenset[SandboxState]]] = {
    SandboxState.READY: frozenset({SandboxState.RUNNING, SandboxState.STOPPED}),
    SandboxState.RUNNING: frozenset({SandboxState.PAUSED, SandboxState.STOPPED}),
    SandboxState.PAUSED: frozenset({SandboxState.RUNNING, SandboxState.STOPPED}),
    SandboxState.STOPPED: frozenset({SandboxState.RUNNING}),
}
# An init process cannot be started twice, so the end of a container is final.
CONTAINER_MOVES: Final[Mapping[ContainerState, frozenset[ContainerState]]] = {
    ContainerState.READY: frozenset({ContainerState.RUNNING, ContainerState.STOPPED}),
    ContainerState.RUNNING: frozenset({ContainerState.PAUSED, ContainerState.STOPPED}),
    ContainerState.PAUSED: frozenset({ContainerState.RUNNING, ContainerState.STOPPED}),
    ContainerState.STOPPED: frozenset(),
}
# A start that the guest refuses leaves the process as it was, and it may be tried again.
PROCESS_MOVES: Final[Mapping[ProcessState, frozenset[ProcessState]]] = {
    ProcessState.CREATED: frozenset({ProcessState.STARTING, ProcessState.STOPPED}),
    ProcessState.STARTING: frozenset({ProcessState.CREATED, ProcessState.RUNNING, ProcessState.STOPPED}),
    ProcessState.RUNNING: frozenset({ProcessState.STOPPED}),
    ProcessState.STOPPED: frozenset(),
}

# What the OCI runtime specification calls a container's states (runtime.md, "State").
OCI_STATUS: Final[Mapping[ContainerState, str]] = {
    **{state: state.value for state in ContainerState},
    ContainerState.READY: "created",
}

_LIVE: Final = frozenset({ContainerState.READY, ContainerState.RUNNING, ContainerState.PAUSED})

# In which states a container takes an operation.
CONTAINER_OPERATIONS: Final[Mapping[str, frozenset[ContainerState]]] = {
    "start": frozenset({ContainerState.READY}),
    "delete": frozenset({ContainerState.READY, ContainerState.STOPPED}),
    "enter": frozenset({ContainerState.READY, ContainerState.RUNNING}),
    "wait": _LIVE,
    "signal": _LIVE,
    "update": frozenset({ContainerState.READY, ContainerState.RUNNING}),
    "pause": frozenset({ContainerState.RUNNING}),
    "resume": frozenset({ContainerState.PAUSED}),
}


def move(moves: Mapping[S, frozenset[S]], current: S, target: S, what: str) -> S:
    """Return the new state. `what` names the thing, such as `container "c1"`. Raises: WrongState."""
    if target not in moves[current]:
        raise WrongState(f"{what}: Can not move from {current} to {target}")
    return target


def require(current: ContainerState, operation: str, what: str) -> None:
    """Check that a container's state allows an operation. Raises: WrongState."""
    allowed = CONTAINER_OPERATIONS[operation]
    if current not in allowed:
        raise WrongState(f"{what} is {current}: Container not {_either(allowed)}, impossible to {operation}")


def _either(states: Iterable[ContainerState]) -> str:
    """Return the states in the order of the lifecycle: "ready, running or paused"."""
    *first, last = (state.value for state in ContainerState if state in states)
    return f"{', '.join(first)} or {last}" if first else last
