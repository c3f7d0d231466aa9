"""The events that containerd published, in their order, recorded with its own client."""

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from tests.harness.containerd import Containerd, HarnessError

# `ctr events`: time, namespace, topic, and the event as JSON.
LINE = re.compile(r" (?P<namespace>\S+) (?P<topic>/\S+) (?P<event>\{.*\})?\s*$")
PROBE_INTERVAL = 0.2


@dataclass(frozen=True, slots=True)
class Event:
    """One event; fields with a zero value are missing from `body`, as Go leaves them out."""

    topic: str
    body: Mapping[str, object] = field(default_factory=dict)

    @property
    def container(self) -> str:
        return str(self.body.get("container_id", ""))

    @property
    def exit_status(self) -> object:
        return self.body.get("exit_status", 0)


class Recorder:
    """Records until the block ends."""

    def __init__(self, containerd: Containerd) -> None:
        self._containerd = containerd
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def __enter__(self) -> "Recorder":
        self._client = self._containerd.popen("events")
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._wait_subscribed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.kill()
        self._reader.join()
        self._client.communicate()

    def of(self, container: str) -> list[Event]:
        """Return the task events of `container` so far."""
        with self._changed:
            return [e for e in self._events if e.container == container and e.topic.startswith("/tasks/")]

    def topics(self, container: str) -> list[str]:
        return [event.topic.removeprefix("/tasks/") for event in self.of(container)]

    def wait_for(
        self, container: str, topic: str, timeout: float = 10.0, *, process: str = ""
    ) -> list[Event]:
        """Wait until `container` has had an event of `topic` (without /tasks/); return all of its events.

        `process` is the id of the only process whose events count. Without it a "delete" is the container's
        own, its last event: that of an exec, which may come earlier, has an id.
        """

        def counts(event: Event) -> bool:
            found = event.body.get("id", "")
            return found == process if process or topic == "delete" else True

        def seen() -> bool:
            return f"/tasks/{topic}" in [event.topic for event in self.of(container) if counts(event)]

        with self._changed:
            if self._changed.wait_for(seen, timeout):
                return self.of(container)
        raise HarnessError(f"no {topic!r} event of {container!r} in {timeout} s, only {self.of(container)}")

    def _read(self) -> None:
        assert self._client.stdout is not None
        for line in self._client.stdout:
            match = LINE.search(line.decode(errors="replace"))
            if match is None or match["namespace"] != self._containerd.namespace:
                continue
            with self._changed:
                self._events.append(Event(match["topic"], json.loads(match["event"] or "{}")))
                self._changed.notify_all()

    def _wait_subscribed(self) -> None:
        """Change a label of the namespace until that is seen: the client does not say when it listens."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            self._containerd.ctr("namespace", "label", self._containerd.namespace, f"at={time.time_ns()}")
            with self._changed:
                if self._changed.wait_for(lambda: bool(self._events), PROBE_INTERVAL):
                    return
        self._client.kill()
        raise HarnessError("containerd publishes no events")
