"""config.json: what is accepted, what is refused and how, and which sandbox a container belongs to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vc.errors import InvalidArgument
from vc.oci.spec import (
    MAX_SPEC_BYTES,
    Identity,
    Role,
    identify,
    namespace,
    parse_spec,
    read_annotations,
    read_spec,
    root,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"process": {"args": "sh"}}', 'c.process.args: got "sh" (a string), must be an array'),
        (b'{"process": {"args": ["a", 7]}}', "c.process.args[1]: got 7 (a number), must be a string"),
        (
            b'{"process": {"user": {"uid": -1}}}',
            "c.process.user.uid: got -1 (a number), must be an integer from 0 to",
        ),
        (b'{"process": {"user": {"uid": true}}}', "c.process.user.uid: got true, must be an integer"),
        (
            b'{"process": {"user": {"uid": 1.5}}}',
            "c.process.user.uid: got 1.5 (a number), must be an integer",
        ),
        (b'{"process": {"terminal": 1}}', "c.process.terminal: got 1 (a number), must be true or false"),
        (b'{"process": {"oomScoreAdj": ' + b"9" * 4000 + b"}}", "c.process.oomScoreAdj: got a huge number"),
        (b'{"process": {"oomScoreAdj": ' + b"9" * 5000 + b"}}", "c is not JSON"),
        (b'{"process": {"cwd": "a\\u0000b"}}', "c.process.cwd: got"),
        (b'{"process": {"cwd": "\\ud800"}}', "c.process.cwd: got"),
        (b'{"annotations": {"a": 1}}', "c.annotations.a: got 1 (a number), must be a string"),
        (b'{"mounts": {"a": 1}}', "c.mounts: got an object, must be an array"),
        (b'{"linux": []}', "c.linux: got an array, must be an object"),
        (b'{"process": {"oomScoreAdj": NaN}}', "c is not JSON: NaN is not a JSON value"),
        (b"[]", "c: got an array, must be an object"),
        (b"null", "c: got null, must be an object"),
        (b"", "c is not JSON"),
        (b"\xff", "c is not JSON"),
        (b"[" * 100_000, "c is nested too deeply"),
        (b" " * (MAX_SPEC_BYTES + 1), "c has more than"),
    ],
)
def test_what_is_wrong_is_named_with_its_path_and_value(text: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match="^" + re.escape(message)):
        parse_spec(text, "c")


def test_null_means_not_given() -> None:
    assert parse_spec(b'{"process": null, "linux": {"resources": {"memory": {"limit": null}}}}') == {
        "linux": {"resources": {"memory": {}}}
    }


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_one_kind_of_error(data: bytes) -> None:
    try:
        assert isinstance(parse_spec(data), dict)
    except InvalidArgument as exc:
        assert "config.json" in str(exc)


def test_a_bundle_without_config_json_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=re.escape(f"{tmp_path}/config.json: No such file or directory")
    ):
        read_spec(tmp_path)


def test_a_bundle_is_read(tmp_path: Path) -> None:
    spec = {"ociVersion": "1.0.2", "process": {"terminal": True}, "root": {"path": "r", "readonly": True}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    found = read_spec(tmp_path)
    assert found == spec
    assert root(found) == ("r", True)


@pytest.mark.parametrize(
    ("annotations", "identity"),
    [
        ({}, Identity(Role.SINGLE, "c1")),
        ({"io.kubernetes.cri.sandbox-id": "s1"}, Identity(Role.SINGLE, "c1")),
        (
            {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1"},
            Identity(Role.SANDBOX, "c1"),
        ),
        (
            {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"},
            Identity(Role.CONTAINER, "s1"),
        ),
        (
            {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "s1"},
            Identity(Role.CONTAINER, "s1"),
        ),
        ({"io.kubernetes.docker.type": "podsandbox"}, Identity(Role.SANDBOX, "c1")),
        (
            {"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "s1"},
            Identity(Role.CONTAINER, "s1"),
        ),
    ],
)
def test_the_annotations_of_each_manager_tell_role_and_sandbox(
    annotations: dict[str, str], identity: Identity
) -> None:
    assert identify(annotations, "c1") == identity


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (
            {"io.kubernetes.cri.container-type": "podsandbox"},
            'got "podsandbox" (a string), must be "sandbox" or "container"',
        ),
        ({"io.kubernetes.cri.container-type": "container"}, "annotation io.kubernetes.cri.sandbox-id"),
        (
            {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "../x"},
            'annotation io.kubernetes.cri.sandbox-id "../x"',
        ),
    ],
)
def test_odd_pod_annotations_are_refused(annotations: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        identify(annotations, "c1")


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\nb", "-a", "a" * 129, "a", "é1"])
def test_ids_that_are_no_safe_file_names_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="container id"):
        identify({}, bad)


def test_namespaces_are_absent_new_or_given() -> None:
    spec = {"linux": {"namespaces": [{"type": "network", "path": "/run/netns/a"}, {"type": "pid"}]}}
    assert namespace(spec, "network") == "/run/netns/a"
    assert namespace(spec, "pid") == ""
    assert namespace(spec, "user") is None
    assert namespace({}, "pid") is None


def test_annotations_must_be_strings() -> None:
    assert read_annotations({}) == {}
    with pytest.raises(InvalidArgument, match=re.escape("annotations.a: got 1 (a number), must be a string")):
        read_annotations({"annotations": {"a": 1}})
