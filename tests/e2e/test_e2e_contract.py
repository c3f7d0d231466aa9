"""The Task service, call by call in every state, on our shim and on runc's, which is what clients know.

Containers are made by calling the shim directly: containerd's client would refuse half of these calls itself.
What runc's shim does is the table; where ours does something else, DIFFERENCES says what and why, and
docs/contract.md is made from both (`python -m tests.e2e.test_e2e_contract`).
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import Message

from protos.containerd import task_v2_pb2 as api
from protos.containerd.task_types_pb2 import Status
from tests.harness.containerd import TIMEOUT, Containerd
from tests.harness.events import Event, Recorder
from tests.harness.runtimes import ROOT
from tests.harness.shim_client import PROCESS_TYPE, RESOURCES_TYPE, Shim
from ttrpc.status import Code

DOCUMENT = ROOT / "docs" / "contract.md"
BLOCKS = 0.5  # seconds without an answer that prove a wait
INSTANT = 10  # processes that end at once
SURVIVES = 1.0  # seconds after a deadly signal that prove a process alive
PROCESS = {"type_url": PROCESS_TYPE, "value": b'{"args": ["true"], "cwd": "/", "env": ["PATH=/bin"]}'}

# What each row sends beside the ids.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "ResizePty": {"width": 80, "height": 25},
    "CloseIO": {"stdin": True},
    "Update": {"resources": {"type_url": RESOURCES_TYPE, "value": b'{"cpu": {"shares": 512}}'}},
    "Checkpoint": {"path": "/nonexistent/checkpoint"},
    "Exec": {"spec": PROCESS},
    "Kill 0": {"signal": 0},
    "Kill TERM": {"signal": 15},
    "Kill KILL": {"signal": 9},
    "Kill KILL all": {"signal": 9, "all": True},
}
DEADLY = ("Kill TERM", "Kill KILL", "Kill KILL all")

# runc's shim. A cell is the status code or what the answer says, and the state afterwards if it is another.
# Cells are two blanks or more apart; "gone" is both deleted and never there.
# Events: what each carries (fields with a zero value are left out), and which come, in their order.
CARRIES: Mapping[str, frozenset[str]] = {
    "create": frozenset({"container_id", "bundle", "rootfs", "io", "pid"}),
    "start": frozenset({"container_id", "pid"}),
    "paused": frozenset({"container_id"}),
    "resumed": frozenset({"container_id"}),
    "exec-added": frozenset({"container_id", "exec_id"}),
    "exec-started": frozenset({"container_id", "exec_id", "pid"}),
    "exit": frozenset({"container_id", "id", "pid", "exit_status", "exited_at"}),
    "delete": frozenset({"container_id", "pid", "exit_status", "exited_at"}),  # and "id" for an exec
}
HISTORIES: Mapping[str, Sequence[str]] = {
    "a container that ends": ["create", "start", "exit", "delete"],
    "one that was paused meanwhile": ["create", "start", "paused", "resumed", "exit", "delete"],
    "one killed before its start": ["create", "exit", "delete"],
    "one deleted before its start": ["create", "exit", "delete"],
    "an exec that ends": ["exec-added", "exec-started", "exit"],
    "an exec deleted before its start": ["exec-added"],
}
EXEC_DELETE = "a client that follows events sees that an exec's id is free again; its `id` is the exec's"

INIT = """
               created             running             paused              stopped       gone
State          CREATED             RUNNING             PAUSED              STOPPED 137   NOT_FOUND
Connect        pid                 pid                 pid                 pid           no pid
Pids           some                some                some                none          NOT_FOUND
Stats          OK                  OK                  OK                  OK            NOT_FOUND
Wait           blocks              blocks              blocks              OK 137        NOT_FOUND
ResizePty      OK                  OK                  OK                  OK            NOT_FOUND
CloseIO        OK                  OK                  OK                  OK            NOT_FOUND
Update         OK                  OK                  OK                  UNKNOWN       NOT_FOUND
Checkpoint     UNKNOWN             UNKNOWN             UNKNOWN             UNKNOWN       NOT_FOUND
Exec           OK                  OK                  UNKNOWN             UNKNOWN       NOT_FOUND
Kill 0         OK                  OK                  OK                  NOT_FOUND     NOT_FOUND
Kill TERM      OK -> stopped 2     OK -> stopped 143   OK                  NOT_FOUND     NOT_FOUND
Kill KILL      OK -> stopped 137   OK -> stopped 137   OK -> stopped 137   NOT_FOUND     NOT_FOUND
Kill KILL all  OK -> stopped 137   OK -> stopped 137   OK -> stopped 137   OK            NOT_FOUND
Pause          UNKNOWN             OK -> paused        UNKNOWN             UNKNOWN       NOT_FOUND
Resume         UNKNOWN             UNKNOWN             OK -> running       UNKNOWN       NOT_FOUND
Start          OK -> running       UNKNOWN             UNKNOWN             UNKNOWN       NOT_FOUND
Delete         OK 0 -> gone        UNKNOWN             UNKNOWN             OK 137 -> gone  NOT_FOUND
"""
EXEC = """
               created              running             stopped         gone
State          CREATED              RUNNING             STOPPED 137     NOT_FOUND
Wait           blocks               blocks              OK 137          NOT_FOUND
ResizePty      OK                   OK                  UNKNOWN         NOT_FOUND
CloseIO        OK                   OK                  OK              UNKNOWN
Kill 0         FAILED_PRECONDITION  OK                  NOT_FOUND       NOT_FOUND
Kill TERM      FAILED_PRECONDITION  OK -> stopped 143   NOT_FOUND       NOT_FOUND
Kill KILL      FAILED_PRECONDITION  OK -> stopped 137   NOT_FOUND       NOT_FOUND
Start          OK -> running        UNKNOWN             UNKNOWN         NOT_FOUND
Delete         OK 0 -> gone         UNKNOWN             OK 137 -> gone  NOT_FOUND
Exec           ALREADY_EXISTS       ALREADY_EXISTS      ALREADY_EXISTS  OK -> created
"""

RUNTIMES = {"ours": "io.containerd.kata.v2", "runc": "io.containerd.runc.v2"}
REPEATED = """
Each event is told once, and those of one shim in their order, with one exception: if the connection ends, or
the time, between an event and containerd's answer to it, nobody knows whether it was heard. Then it is told
again, unchanged and in its place: a repeated exit harms nobody, a lost one is waited for in vain. runc's shim
repeats it, too, but later ones may overtake it. The test of that is
`test_an_event_whose_answer_is_lost_comes_again_in_its_place_and_unchanged`.
"""
INTRODUCTION = """\
# The Task service, call by call

What every call of containerd's Task service answers in every state of a process, and what is told to whoever
follows events. This page is made from the tables in `tests/e2e/test_e2e_contract.py`, which puts every cell
to the test, on our shim and on runc's, below a real containerd.

A cell is the status code or what the answer says, then the state afterwards if it is another. *blocks*: no
answer until the process ends. *gone*: deleted, or never there. \\*: runc's shim does something else, as told
below."""

Table = Mapping[tuple[str, str], str]  # by row and column


def parse(text: str) -> Table:
    head, *lines = text.strip("\n").splitlines()
    columns = head.split()
    table = {}
    for line in lines:
        row, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert len(cells) == len(columns), line
        table.update({(row, column): cell for column, cell in zip(columns, cells, strict=True)})
    return table


@dataclass(frozen=True)
class Difference:
    """Cells where our shim does something else."""

    process: str
    rows: Sequence[str]
    columns: Sequence[str]
    ours: str
    reason: str


WRONG_STATE = "the error has a class that clients can tell; runc's shim gives it none"
NEVER_RAN = "a process that never ran did not succeed: 0 would say so"
DIFFERENCES = (
    Difference(
        "init", ["Pids"], ["stopped"], "some", "containerd 1.7 and later take a task without for a leak"
    ),
    Difference(
        "init", ["Kill TERM"], ["created"], "OK -> stopped 143", "128 + signal, as once it runs; 2 is runc's"
    ),
    Difference("init", ["Delete"], ["created"], "OK 137 -> gone", NEVER_RAN),
    Difference(
        "init",
        ["Checkpoint"],
        ["created", "running", "paused", "stopped"],
        "UNIMPLEMENTED",
        "checkpoints of tasks are not supported; with CRIU installed runc would make them of the middle two",
    ),
    Difference("init", ["Update"], ["stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("init", ["Exec"], ["paused", "stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("init", ["Pause"], ["created", "paused", "stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("init", ["Resume"], ["created", "running", "stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("init", ["Start"], ["running", "paused", "stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("init", ["Delete"], ["running", "paused"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("exec", ["Start"], ["running", "stopped"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("exec", ["Delete"], ["running"], "FAILED_PRECONDITION", WRONG_STATE),
    Difference("exec", ["Delete"], ["created"], "OK 255 -> gone", NEVER_RAN),
    Difference(
        "exec", ["ResizePty"], ["stopped"], "OK", "there is no terminal to resize, in this state as in others"
    ),
    Difference("exec", ["CloseIO"], ["gone"], "NOT_FOUND", "the class that every other call answers with"),
)


def expected(runtime: str, process: str) -> Table:
    table = dict(parse(INIT if process == "init" else EXEC))
    if runtime == "ours":
        for difference in DIFFERENCES:
            if difference.process == process:
                table.update({(r, c): difference.ours for r in difference.rows for c in difference.columns})
    return table


Ids = Mapping[str, Any]  # of a request: of the task, and of the exec if it is one


@dataclass
class Subjects:
    """Processes in every state: the one that was last brought there, unless it has left since."""

    shim: Shim
    container: str = ""  # in which to run execs; empty: the processes are first ones of containers
    known: dict[str, Ids] = field(default_factory=dict)

    def get(self, state: str) -> Ids:
        ids = self.known.get(state)
        if ids is None or self.state(ids).split()[0] != state:
            ids = self.known[state] = self._bring(state)
        return ids

    def state(self, ids: Ids) -> str:
        answer = self.shim.call("State", **ids)
        if answer.code == Code.NOT_FOUND:
            return "gone"
        assert isinstance(answer.message, api.StateResponse), answer
        name = Status.Name(answer.message.status).lower()
        return f"{name} {answer.message.exit_status}" if name == "stopped" else name

    def _bring(self, state: str) -> Ids:
        if state == "created":
            if not self.container:
                return {"id": self.shim.create()}
            return {"id": self.container, "exec_id": self.shim.exec(self.container)}
        ids = self.get(
            {"running": "created", "paused": "running", "stopped": "running", "gone": "stopped"}[state]
        )
        if state == "running" and not self.container:
            self.shim.start(ids["id"])
        elif state == "running":
            self.shim.must("Start", **ids)
        elif state == "paused":
            self.shim.must("Pause", **ids)
        elif state == "stopped":
            self.shim.must("Kill", signal=9, **ids)
            self.shim.must("Wait", **ids)
        else:
            self.shim.must("Delete", **ids)
        return ids


def observe(subjects: Subjects, row: str, column: str, wanted: str) -> str:
    """Return the cell as it is. What is wanted only says how long to wait."""
    shim, ids = subjects.shim, subjects.get(column)
    fields = {**ids, **FIELDS.get(row, {})}
    if row == "Exec":
        fields.setdefault("exec_id", "another")
    answer = shim.call(row.split()[0], BLOCKS if wanted == "blocks" else TIMEOUT, **fields)
    if answer.code is None:
        return "blocks"
    if row in DEADLY and answer.code == Code.OK:
        shim.call("Wait", TIMEOUT if "stopped" in wanted else SURVIVES, **ids)
    said = answer.code.name if answer.message is None else describe(answer.message)
    after = subjects.state(ids)
    return said if after.split()[0] == column else f"{said} -> {after}"


def describe(message: Message) -> str:
    match message:
        case api.StateResponse(status=status, exit_status=exit_status):
            return Status.Name(status) + (f" {exit_status}" if status == Status.STOPPED else "")
        case api.ConnectResponse(task_pid=pid):
            return "pid" if pid else "no pid"
        case api.PidsResponse(processes=processes):
            return "some" if processes else "none"
        case api.WaitResponse(exit_status=exit_status) | api.DeleteResponse(exit_status=exit_status):
            return f"OK {exit_status}"
    return "OK"


@pytest.fixture(scope="module", params=RUNTIMES)
def shim(containerd: Containerd, request: pytest.FixtureRequest) -> Iterator[Shim]:
    if request.param == "ours" and not containerd.runtime.is_vm:
        pytest.skip("the runtime that was asked for is runc, which the other half is about")
    shim = Shim(containerd, RUNTIMES[request.param])
    try:
        yield shim
    finally:
        shim.close()


@pytest.fixture
def runtime(shim: Shim) -> str:
    return next(name for name, full in RUNTIMES.items() if full == shim.runtime)


def check(subjects: Subjects, wanted: Table) -> None:
    found = {}
    for column in dict.fromkeys(column for _, column in wanted):
        for row in dict.fromkeys(row for row, _ in wanted):
            found[row, column] = observe(subjects, row, column, wanted[row, column])
    assert {cell: text for cell, text in found.items() if text != wanted[cell]} == {}


def test_calls_on_init(shim: Shim, runtime: str) -> None:
    wanted = expected(runtime, "init")
    check(Subjects(shim), wanted)


def test_calls_on_a_container_that_never_was(shim: Shim, runtime: str) -> None:
    wanted = {cell: text for cell, text in expected(runtime, "init").items() if cell[1] == "gone"}
    check(Subjects(shim, known={"gone": {"id": "nobody"}}), wanted)


def test_calls_on_an_exec(shim: Shim, runtime: str) -> None:
    container = shim.create()
    shim.start(container)
    wanted = expected(runtime, "exec")
    check(Subjects(shim, container), wanted)
    wanted = {cell: text for cell, text in wanted.items() if cell[1] == "gone"}
    nobody = {"id": container, "exec_id": "nobody"}
    check(Subjects(shim, container, {"gone": nobody}), wanted)


def topics_of(events: Sequence[Event]) -> list[str]:
    """Return what is told, in order, after a look at what each event carries."""
    topics = [event.topic.removeprefix("/tasks/") for event in events]
    for topic, event in zip(topics, events, strict=True):
        of_exec = {"id"} if topic == "delete" and "id" in event.body else set()
        zero = {"exit_status"} & CARRIES[topic] if event.exit_status == 0 else set()
        assert set(event.body) | zero == CARRIES[topic] | of_exec, event
    return topics


def of_exec(events: Sequence[Event], exec_id: str) -> list[Event]:
    return [event for event in events if exec_id in (event.body.get("exec_id"), event.body.get("id"))]


def at_once(shim: Shim, name: str, ids: Sequence[Ids]) -> list[Any]:
    with ThreadPoolExecutor(INSTANT) as pool:
        return list(pool.map(lambda fields: shim.must(name, **fields), ids))


def history(runtime: str, what: str) -> list[str]:
    ours = ["delete"] if runtime == "ours" and "exec" in what else []
    return [*HISTORIES[what], *ours]


def test_events_of_containers_that_end_at_once(shim: Shim, runtime: str, events: Recorder) -> None:
    ids = [{"id": shim.create("false")} for _ in range(INSTANT)]
    pids = [answer.pid for answer in at_once(shim, "Start", ids)]
    at_once(shim, "Wait", ids)
    at_once(shim, "Delete", ids)
    for container, pid in zip([each["id"] for each in ids], pids, strict=True):
        mine = events.wait_for(container, "delete")
        assert topics_of(mine) == history(runtime, "a container that ends")
        assert {event.body["pid"] for event in mine} == {pid}
        assert [event.body["id"] for event in mine if "id" in event.body] == [container]
        assert [event.exit_status for event in mine[-2:]] == [1, 1]
        assert mine[-1].body["exited_at"] == mine[-2].body["exited_at"]


def test_events_of_execs_that_end_at_once(shim: Shim, runtime: str, events: Recorder) -> None:
    container = shim.create()
    shim.start(container)
    ids = [{"id": container, "exec_id": shim.exec(container, ["false"])} for _ in range(INSTANT)]
    unstarted = {"id": container, "exec_id": shim.exec(container)}
    pids = [answer.pid for answer in at_once(shim, "Start", ids)]
    at_once(shim, "Wait", ids)
    at_once(shim, "Delete", [*ids, unstarted])
    shim.must("Kill", id=container, signal=9)
    told = events.wait_for(container, "exit", process=container)  # the last: no exec outlives its container
    for exec_id, pid in zip([each["exec_id"] for each in ids], pids, strict=True):
        mine = of_exec(told, exec_id)
        assert topics_of(mine) == history(runtime, "an exec that ends")
        assert {event.body["pid"] for event in mine if "pid" in event.body} == {pid}
        assert [event.exit_status for event in mine if event.topic == "/tasks/exit"] == [1]
    mine = of_exec(told, unstarted["exec_id"])
    assert topics_of(mine) == history(runtime, "an exec deleted before its start")


def test_the_exit_of_an_exec_is_told_before_that_of_its_container(shim: Shim, events: Recorder) -> None:
    container = shim.create()
    shim.start(container)
    execs = [shim.exec(container) for _ in range(3)]
    at_once(shim, "Start", [{"id": container, "exec_id": exec_id} for exec_id in execs])
    shim.must("Kill", id=container, signal=9, all=True)
    exits = [e for e in events.wait_for(container, "exit", process=container) if e.topic == "/tasks/exit"]
    assert sorted(str(event.body["id"]) for event in exits[:-1]) == sorted(execs)
    assert [event.exit_status for event in exits] == [137] * 4


def test_events_of_containers_that_were_paused_or_never_ran(
    shim: Shim, runtime: str, events: Recorder
) -> None:
    paused, killed, deleted = shim.create(), shim.create(), shim.create()
    shim.start(paused)
    shim.must("Pause", id=paused)
    shim.must("Resume", id=paused)
    for container in (paused, killed):
        shim.must("Kill", id=container, signal=9)
        shim.must("Wait", id=container)
    for container, what in (
        (paused, "one that was paused meanwhile"),
        (killed, "one killed before its start"),
        (deleted, "one deleted before its start"),
    ):
        shim.must("Delete", id=container)
        assert topics_of(events.wait_for(container, "delete")) == history(runtime, what)


def test_a_container_is_updated_while_it_starts(shim: Shim) -> None:
    """Symptom of peers: limits that are changed in that moment crash the agent."""
    containers = [shim.create() for _ in range(3)]
    with ThreadPoolExecutor(4 * len(containers)) as pool:
        answers = [
            pool.submit(shim.call, name, id=container, **FIELDS.get(name, {}))
            for container in containers
            for name in ("Update", "Start", "Update", "Update")
        ]
        assert {answer.result().code for answer in answers} == {Code.OK}
    subjects = Subjects(shim)
    assert {subjects.state({"id": container}) for container in containers} == {"running"}


def test_a_checkpoint_that_is_refused_is_not_told_as_one(shim: Shim, runtime: str, events: Recorder) -> None:
    container = shim.create()
    shim.start(container)
    assert shim.call("Checkpoint", id=container, **FIELDS["Checkpoint"]).code != Code.OK
    shim.must("Kill", id=container, signal=9)
    shim.must("Wait", id=container)
    shim.must("Delete", id=container)
    assert topics_of(events.wait_for(container, "delete")) == history(runtime, "a container that ends")


def rendered() -> str:
    """Return the document: what our shim does, and where runc's does something else."""
    parts = [INTRODUCTION]
    for process, title in (("init", "A container's first process"), ("exec", "Execs")):
        ours, theirs = expected("ours", process), expected("runc", process)
        columns = list(dict.fromkeys(column for _, column in ours))
        parts += [f"\n## {title}\n", row_of(["call", *columns]), row_of(["---"] * (len(columns) + 1))]
        for row in dict.fromkeys(row for row, _ in ours):
            cells = [ours[row, c] + ("" if ours[row, c] == theirs[row, c] else " \\*") for c in columns]
            parts.append(row_of([row, *cells]))
    parts += [
        "\n## Where runc's shim does something else\n",
        row_of(["process", "call", "state", "ours", "runc's", "why"]),
        row_of(["---"] * 6),
    ]
    for difference in DIFFERENCES:
        theirs = expected("runc", difference.process)
        cells = [theirs[row, column] for row in difference.rows for column in difference.columns]
        where = [", ".join(difference.rows), ", ".join(difference.columns)]
        theirs_too = ", ".join(dict.fromkeys(cells))
        parts.append(row_of([difference.process, *where, difference.ours, theirs_too, difference.reason]))
    parts += ["\n## Events\n", row_of(["history", "ours", "runc's"]), row_of(["---"] * 3)]
    for what in HISTORIES:
        parts.append(row_of([what, *(", ".join(history(runtime, what)) for runtime in RUNTIMES)]))
    parts += [REPEATED, f"`delete` of an exec: {EXEC_DELETE}.\n"]
    parts += [row_of(["event", "its fields, but for those that are zero"]), row_of(["---"] * 2)]
    parts += [row_of([topic, ", ".join(sorted(fields))]) for topic, fields in CARRIES.items()]
    return "\n".join(parts) + "\n"


def row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def test_the_document_says_the_same() -> None:
    assert DOCUMENT.read_text() == rendered(), "run python -m tests.e2e.test_e2e_contract"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered())
