"""The command line, and what containerd writes to standard input."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from protos.containerd.bootstrap_pb2 import BootstrapParams, LogLevel
from shim import bootstrap
from shim.args import UsageError, parse

# Recorded from containerd 1.6.20, 1.7.24 and 2.1.9.
START = ["-namespace", "default", "-address", "/run/containerd/containerd.sock"]
START += ["-publish-binary", "/usr/bin/containerd", "-id", "c1", "start"]
DELETE = [*START[:-1], "-bundle", "/run/b/c1", "delete"]


def test_what_containerd_passes_for_start_and_delete() -> None:
    args = parse(START)
    assert (args.action, args.namespace, args.id) == ("start", "default", "c1")
    assert (args.address, args.debug) == ("/run/containerd/containerd.sock", False)
    args = parse(DELETE)
    assert (args.action, args.bundle) == ("delete", "/run/b/c1")


def test_what_cri_o_passes() -> None:
    args = parse(
        ["-namespace", "default", "-address", "", "-publish-binary", "crio", "-id", "x", "-debug", "start"]
    )
    assert (args.action, args.address, args.debug) == ("start", "", True)


@pytest.mark.parametrize(
    "argv",
    [
        ["-namespace=n", "-id=i", "-debug", "start"],
        ["--namespace", "n", "--id=i", "--debug", "start"],
        ["-namespace", "n", "-id", "i", "-debug=true", "--", "start"],
        ["-debug=T", "-newer-flag", "value", "-namespace", "n", "-id", "i", "-other", "start"],
        ["-debug", "-newer=flag", "-id", "x", "-id", "i", "-namespace", "n", "start", "ignored"],
    ],
)
def test_every_spelling_of_go_flags_means_the_same(argv: list[str]) -> None:
    args = parse(argv)
    assert (args.action, args.namespace, args.id, args.debug) == ("start", "n", "i", True)


def test_a_false_boolean_is_false() -> None:
    assert not parse(["-debug=false", *START]).debug


@pytest.mark.parametrize(
    ("argv", "action"), [(["-v"], "version"), (["--version"], "version"), (["-info"], "info")]
)
def test_questions_about_the_program_need_no_other_flag(argv: list[str], action: str) -> None:
    assert parse(argv).action == action


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["-id", "i", "start"], "-namespace"),
        (["-namespace", "", "-id", "i", "start"], "-namespace"),
        (["-namespace", "n", "start"], "-id"),
        (["-namespace", "n", "-id", "../x", "start"], "../x"),
        (["-namespace", "n", "-id", "i", "stop"], "stop"),
        (["-namespace", "n", "-id"], "-id"),
        (["-debug=maybe", *START], "maybe"),
    ],
)
def test_what_makes_no_sense_is_named(argv: list[str], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    assert word in str(caught.value)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_no_command_line_ends_in_anything_but_usage(argv: list[str]) -> None:
    try:
        parse(argv)
    except UsageError:
        pass


PARAMS = BootstrapParams(
    instance_id="c1",
    namespace="ns",
    log_level=LogLevel.LOG_LEVEL_DEBUG,
    containerd_version="2.3.0",
    containerd_ttrpc_address="unix:///run/containerd/containerd.sock.ttrpc",
    socket_dir="/run/s",
)


def test_bootstrap_params_are_read() -> None:
    PARAMS.extensions.add().value.type_url = "runtimeoptions.v1.Options"
    found = bootstrap.parse_untrusted(PARAMS.SerializeToString(), task_id="c1", namespace="ns")
    assert (found.debug, found.socket_dir) == (True, "/run/s")
    assert found.ttrpc_address == "/run/containerd/containerd.sock.ttrpc"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        Any(type_url="containerd.runc.v1.Options", value=b"\x08\x01").SerializeToString(),
        BootstrapParams(instance_id="other", namespace="ns", socket_dir="/x").SerializeToString(),
        BootstrapParams(instance_id="c1", namespace="other", socket_dir="/x").SerializeToString(),
        PARAMS.SerializeToString()[:-3],
        b"\xff" * 40,
    ],
)
def test_other_input_is_taken_for_none(data: bytes) -> None:
    found = bootstrap.parse_untrusted(data, task_id="c1", namespace="ns")
    assert (found.debug, found.socket_dir, found.ttrpc_address) == (False, "", "")


@given(st.binary(max_size=200))
def test_no_input_makes_start_fail(data: bytes) -> None:
    bootstrap.parse_untrusted(data, task_id="", namespace="")
