"""Read the command line: flags in Go's syntax before one action word.

`-x v`, `-x=v`, `--x v` and `--x=v` mean the same; a boolean takes a value only after `=`; `--` or the first
word that is no flag ends the flags. Flags that nobody has told us of are passed over, so that a newer
containerd can still start an older shim. Parsed by hand: argparse alone costs as much as the rest of `start`.
"""

VALUE_FLAGS = ("namespace", "address", "publish-binary", "id", "bundle", "socket", "debug-socket")
BOOLEAN_FLAGS = ("debug", "v", "version", "info")
ACTIONS = ("start", "delete")
TRUE = ("1", "t", "T", "true", "TRUE", "True")  # what Go's strconv.ParseBool takes for true
FALSE = ("0", "f", "F", "false", "FALSE", "False")


class UsageError(Exception):
    """The command line makes no sense; the text is for the user."""


class Args:
    """The command line. `action` is `start`, `delete`, `version`, `info`, or empty to serve."""

    __slots__ = ("action", "address", "bundle", "debug", "id", "namespace", "publish_binary", "socket")

    def __init__(self) -> None:
        self.action = ""
        self.namespace = ""
        self.id = ""
        self.address = ""  # of containerd's gRPC socket
        self.publish_binary = ""
        self.bundle = ""
        self.socket = ""
        self.debug = False


def parse(argv: list[str]) -> Args:
    """Return what the words after the program's name ask for.

    Raises:
        UsageError: a flag without its value, an unknown action, or no id or namespace where one is needed.
    """
    flags, words = _split(argv)
    args = Args()
    args.namespace = flags.get("namespace", "")
    args.id = flags.get("id", "")
    args.address = flags.get("address", "")
    args.publish_binary = flags.get("publish-binary", "")
    args.bundle = flags.get("bundle", "")
    args.socket = flags.get("socket", "")
    args.debug = "debug" in flags
    if "v" in flags or "version" in flags:
        args.action = "version"
        return args
    if "info" in flags:
        args.action = "info"
        return args
    if words:
        args.action = words[0]
        if args.action not in ACTIONS:
            raise UsageError(f"unknown action {args.action!r}: expected start or delete")
    for flag, value in (("namespace", args.namespace), ("id", args.id)):
        if not value:
            raise UsageError(f"-{flag} is missing or empty: containerd passes it with every action")
        if "/" in value or value in (".", ".."):
            raise UsageError(f"-{flag} {value!r} cannot be part of a path")
    return args


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the flags with their values from the words after them. False booleans are left out."""
    flags: dict[str, str] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("-") or word == "-":
            break
        position += 1
        if word == "--":
            break
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if name in BOOLEAN_FLAGS:
            if equals and value not in TRUE + FALSE:
                raise UsageError(f"invalid boolean value {value!r} for -{name}")
            if not equals or value in TRUE:
                flags[name] = "true"
            continue
        if not equals:
            following = argv[position] if position < len(argv) else None
            if name in VALUE_FLAGS:
                if following is None:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = following
                position += 1
            elif following is not None and not following.startswith("-") and following not in ACTIONS:
                position += 1  # an unknown flag: the next word can only be its value
        flags[name] = value
    return flags, argv[position:]
