"""The second half of scripts/quickstart: one container in a VM, from nothing to nothing.

Prints one line a step, with its duration, as the script does for its own steps.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.harness import runtimes
from tests.harness.containerd import Containerd, HarnessError
from tests.harness.leaks import SHIM_SOCKETS


@contextmanager
def step(title: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{title:60} {time.monotonic() - began:5.1f} s", flush=True)


def main() -> int:
    containerd = Containerd(runtimes.kata)
    try:
        with step("private containerd"):
            containerd.open()
        with step("busybox image"):
            containerd.import_image()
        container = containerd.new_id("quickstart")
        with step(f"ctr run --rm --runtime {containerd.runtime.name} ... uname -a"):
            result = containerd.run("uname", "-a", container=container)
        if result.exit_status != 0:
            print(f"{result}\n{containerd.log_since(0)}", file=sys.stderr)
            return 1
    except HarnessError as exc:
        print(exc, file=sys.stderr)
        return 1
    finally:
        with step("stop everything"):
            containerd.close()
            for directory in (SHIM_SOCKETS, SHIM_SOCKETS.parent):
                with suppress(OSError):
                    directory.rmdir()  # unless another containerd uses it
    print(f"\nhost   {' '.join(os.uname())}")
    print(f"guest  {result.stdout.decode().strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
