"""The program `containerd-shim-kata-v2`: one action per run, chosen by the command line.

Standard error belongs to containerd: with `start` it is the same pipe as the address, and elsewhere a text on
it turns into a warning. So from the first moment on everything but one final line goes to /dev/null: warnings
of the interpreter and of libraries can neither be turned off on our command line nor be foreseen.
"""

import os
import sys

from shim import args as command_line


def main() -> int:
    """Run the action that the command line names; return the exit status."""
    errors = os.dup(2)
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        return run(sys.argv[1:])
    except Exception as exc:
        # The text becomes the error that the user of containerd sees.
        os.write(errors, f"{describe(exc)}\n".encode())
        return 1


def describe(exc: Exception) -> str:
    """Return one line for the user. An exception without a text of ours is named by its class."""
    text = " ".join(str(exc).split())
    foreseen = type(exc).__module__.startswith("shim.") or isinstance(exc, OSError)
    return text if foreseen and text else f"{type(exc).__name__}: {text}"


def run(argv: list[str]) -> int:
    """Dispatch; each action imports what it needs and no more."""
    args = command_line.parse(argv)
    if args.action == "start":
        from shim import start

        return start.main(args)
    if args.action == "delete":
        from shim import delete

        return delete.main(args)
    if args.action in ("version", "info"):
        from shim import info

        return info.main(args)
    raise command_line.UsageError("no action: expected start, delete, -v or -info")


if __name__ == "__main__":
    sys.exit(main())
