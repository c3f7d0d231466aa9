"""Lifecycle tables."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import WrongState
from vc.states import (
    CONTAINER_MOVES,
    CONTAINER_OPERATIONS,
    OCI_STATUS,
    PROCESS_MOVES,
    SANDBOX_MOVES,
    ContainerState,
    ProcessState,
    SandboxState,
    move,
    require,
)


def test_a_refused_move_names_the_thing_and_both_states() -> None:
    with pytest.raises(WrongState, match=re.escape('container "c1": Can not move from stopped to running')):
        move(CONTAINER_MOVES, ContainerState.STOPPED, ContainerState.RUNNING, 'container "c1"')


@pytest.mark.parametrize(
    ("state", "operation", "text"),
    [
        (ContainerState.STOPPED, "signal", "Container not ready, running or paused, impossible to signal"),
        (ContainerState.RUNNING, "delete", "Container not ready or stopped, impossible to delete"),
        (ContainerState.READY, "pause", "Container not running, impossible to pause"),
        (ContainerState.RUNNING, "resume", "Container not paused, impossible to resume"),
    ],
)
def test_a_refused_operation_says_what_it_needs(state: ContainerState, operation: str, text: str) -> None:
    with pytest.raises(WrongState, match=f'^container "c1" is {state}: {text}$'):
        require(state, operation, 'container "c1"')


def test_operations_are_allowed_exactly_where_the_table_says() -> None:
    for operation, allowed in CONTAINER_OPERATIONS.items():
        for state in allowed:
            require(state, operation, "c")
        for state in set(ContainerState) - allowed:
            with pytest.raises(WrongState):
                require(state, operation, "c")


def test_the_oci_status_of_ready_is_created() -> None:
    assert [OCI_STATUS[state] for state in ContainerState] == ["created", "running", "paused", "stopped"]


def test_whatever_lives_can_be_stopped_and_every_state_has_a_row() -> None:
    for state in SandboxState:
        assert state is SandboxState.STOPPED or SandboxState.STOPPED in SANDBOX_MOVES[state]
    for container in ContainerState:
        assert container is ContainerState.STOPPED or ContainerState.STOPPED in CONTAINER_MOVES[container]
    for process in ProcessState:
        assert process is ProcessState.STOPPED or ProcessState.STOPPED in PROCESS_MOVES[process]


@given(st.lists(st.sampled_from(ContainerState), max_size=10))
def test_on_any_walk_a_container_pauses_only_while_it_runs_and_never_comes_back(
    wishes: list[ContainerState],
) -> None:
    trail = [ContainerState.READY]
    for wish in wishes:
        try:
            trail.append(move(CONTAINER_MOVES, trail[-1], wish, "c"))
        except WrongState:
            continue
    assert ContainerState.STOPPED not in trail[:-1]
    for before, after in pairwise(trail):
        assert after is not ContainerState.PAUSED or before is ContainerState.RUNNING
