"""The agent's end of a terminal, with a real one and no container."""

import os
import pty
import threading
import tty

from agent import stdio
from agent.streams import ByteStream

ROUNDS = 50  # which of two threads wakes first is the kernel's choice
LIMIT = 20.0  # seconds: only a hang takes as long


class Host(ByteStream):
    """A connection that takes everything at once."""

    def __init__(self) -> None:
        self._came = threading.Condition()
        self._data = b""

    def send(self, data: bytes | memoryview) -> None:
        with self._came:
            self._data += data
            self._came.notify_all()

    def close_sending(self) -> None:
        pass

    def close(self) -> None:
        pass

    def wait(self, data: bytes) -> bool:
        """Wait until exactly this has come; False if it does not."""
        with self._came:
            return self._came.wait_for(lambda: self._data == data, LIMIT)


def test_the_last_words_are_sent_though_a_child_keeps_the_terminal() -> None:
    """Symptom: the end of such a shell was told ten seconds late, and without its last output.

    `settle` took what the terminal held from under the relay, which went back to waiting for the terminal.
    """
    for _ in range(ROUNDS):
        master, child = pty.openpty()
        tty.setraw(child)
        streams, host = stdio.terminal(master), Host()
        relay = threading.Thread(target=streams.stdout.relay, args=(host,))
        relay.start()
        os.write(child, b"first ")
        assert host.wait(b"first ")
        os.write(child, b"last")
        streams.settle()
        told = streams.stdout.bytes_at_exit
        last = host.wait(b"first last")
        os.close(child)
        relay.join(LIMIT)
        streams.close()
        assert (told, last) == (10, True)
