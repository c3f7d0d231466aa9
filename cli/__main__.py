"""`kata-runtime`: what an operator asks of the runtime. An error is one line on stderr and exit status 1."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vc.config import DEFAULT_PATHS, load
from vc.errors import VCError

PROGRAM = "kata-runtime"

CAPABLE = "System is capable of running Kata Containers"
NOT_CAPABLE = "ERROR: System is not capable of running Kata Containers"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.show_default_config_paths:
        print(*DEFAULT_PATHS, sep="\n")
        return 0
    if args.version:
        return show_version()
    if args.command is None:
        parser.print_usage(sys.stderr)
        return 2
    try:
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
    except VCError as exc:
        print(f"{PROGRAM}: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        PROGRAM, description="Look at and steer the runtime that puts pods into VMs."
    )
    parser.add_argument("--config", "--kata-config", metavar="FILE", help="configuration file to use")
    parser.add_argument(
        "--show-default-config-paths",
        "--kata-show-default-config-paths",
        action="store_true",
        help="print where a configuration file is looked for, and exit",
    )
    parser.add_argument("--version", "-v", action="store_true", help="print the version, and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("version", help="print the version")
    check = commands.add_parser("check", aliases=["kata-check"], help="tell whether this host can run pods")
    check.add_argument("--strict", "-s", action="store_true", help="take warnings for failures")
    check.add_argument(
        "--no-network-checks", "-n", action="store_true", help="accepted; this check never asks the network"
    )
    leaks = commands.add_parser("leaks", help="list what is left of sandboxes that are gone; exit 1 if any")
    leaks.add_argument("--fix", action="store_true", help="remove it")
    leaks.add_argument(
        "--run-dir", metavar="DIR", help="where sandboxes keep their state, if not as configured"
    )
    leaks.add_argument(
        "--containerd-address", metavar="SOCKET", help="its name is in those of shims' sockets"
    )
    env = commands.add_parser("env", aliases=["kata-env"], help="show what is configured and installed")
    env.add_argument("--json", action="store_true", help="as JSON instead of TOML")
    env.add_argument("--keys", action="store_true", help="list the configuration keys instead")
    factory = commands.add_parser("factory", help="steer what VMs are started from: template and cache")
    actions = factory.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser("init", help="make the template, unless there is one, and run the VM cache")
    init.add_argument(
        "--background",
        action="store_true",
        help="make no more than the template, in processor time that nobody else wants, unless another "
        "process is making one",
    )
    actions.add_parser("status", help="tell what there is and what it costs")
    actions.add_parser("destroy", help="end the VM cache and remove all templates")
    return parser


def show_version(args: argparse.Namespace | None = None) -> int:
    """Print the versions, in the form of Kata's."""
    from cli.env import OCI_VERSION, own_version

    print(f"{PROGRAM}  : {own_version()}\n   OCI specs: {OCI_VERSION}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what was found, and fail if no pod could run."""
    from cli.check import run_checks
    from cli.report import Level, format_finding

    findings = run_checks(args.config)
    for finding in findings:
        print(format_finding(finding))
    fatal = {Level.FAIL, Level.WARN} if args.strict else {Level.FAIL}
    if any(finding.level in fatal for finding in findings):
        sys.stdout.flush()
        print(NOT_CAPABLE, file=sys.stderr)
        return 1
    print(CAPABLE)
    return 0


def run_env(args: argparse.Namespace) -> int:
    """Print the environment, or the list of keys."""
    from cli.env import collect, list_keys
    from cli.report import format_json, format_toml

    if args.keys:
        print(*list_keys(), sep="\n")
        return 0
    facts = collect(load(args.config, check_files=False))
    print(format_json(facts) if args.json else format_toml(facts))
    return 0


def run_factory(args: argparse.Namespace) -> int:
    """Steer what VMs are started from."""
    from cli.factory import run_factory

    return run_factory(args)


def run_leaks(args: argparse.Namespace) -> int:
    """List or remove what nobody owns."""
    from cli.leaks import run

    return run(args)


COMMANDS = {
    "version": show_version,
    "check": run_check,
    "kata-check": run_check,
    "leaks": run_leaks,
    "env": run_env,
    "kata-env": run_env,
    "factory": run_factory,
}

if __name__ == "__main__":
    sys.exit(main())
