"""The program as an operator runs it: output, exit status, errors on one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vc.config import HypervisorConfig, keys

ROOT = Path(__file__).parents[2]

CONFIG = """
[hypervisor.qemu]
path = "{home}/qemu"
kernel = "{home}/vmlinux"
image = "{home}/rootfs.erofs"
virtio_fs_daemon = "{home}/virtiofsd"
accelerator = "tcg"
agent_transport = "virtio-serial"
default_memory = 256
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a configuration and the programs and files that it names."""
    for name in ("qemu", "virtiofsd"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} version 1.2.3\necho more\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "vmlinux").write_bytes(b"kernel")
    (tmp_path / "rootfs.erofs").write_bytes(b"image")
    (tmp_path / "configuration.toml").write_text(CONFIG.format(home=tmp_path))
    return tmp_path


def run(*argv: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("KATA_CONF_FILE", None)
    if config:
        env["KATA_CONF_FILE"] = str(config)
    return subprocess.run(
        [sys.executable, "-m", "cli", *argv], env=env, capture_output=True, text=True, check=False
    )


def lines_about(subject: str, output: str) -> list[str]:
    return [line for line in output.splitlines() if f" {subject}: " in line[:30]]


def test_version() -> None:
    for argv in (["version"], ["--version"], ["-v"]):
        done = run(*argv)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("kata-runtime  : ")
        assert "\n   OCI specs: " in done.stdout


@pytest.mark.parametrize("flag", ["--show-default-config-paths", "--kata-show-default-config-paths"])
def test_the_default_paths_are_printed_in_order(flag: str) -> None:
    assert run(flag).stdout.splitlines() == [
        "/etc/kata-containers/configuration.toml",
        "/usr/share/defaults/kata-containers/configuration.toml",
    ]


def test_no_command_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("usage: kata-runtime")


@pytest.mark.parametrize("command", ["check", "kata-check"])
def test_check_says_what_it_found(home: Path, command: str) -> None:
    done = run(command, "-n", config=home / "configuration.toml")
    assert lines_about("configuration", done.stdout) == [f"ok    configuration: {home}/configuration.toml"]
    assert lines_about("QEMU", done.stdout) == [f"ok    QEMU: {home}/qemu: qemu version 1.2.3"]
    assert lines_about("virtiofsd", done.stdout) == [
        f"ok    virtiofsd: {home}/virtiofsd: virtiofsd version 1.2.3"
    ]
    assert lines_about("accelerator", done.stdout)[0].startswith("ok    accelerator: tcg")
    assert lines_about("agent transport", done.stdout)[0].startswith("ok    agent transport: virtio-serial")
    failed = any(line.startswith("fail") for line in done.stdout.splitlines())
    assert done.returncode == int(failed)
    assert ("System is capable of running Kata Containers" in done.stdout) is not failed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_check_says_as_whom_qemu_would_run(home: Path) -> None:
    path = home / "configuration.toml"
    done = run("check", config=path)
    [said] = lines_about("isolation", done.stdout)
    assert said.startswith("warn  isolation: QEMU runs as root") and "others may not run" in said
    home.chmod(0o755)
    done = run("check", config=path)
    assert lines_about("isolation", done.stdout) == [
        "ok    isolation: QEMU runs as a user and in a root directory of its own"
    ]
    path.write_text(CONFIG.format(home=home) + "\nrootless = false\n")
    done = run("check", config=path)
    assert lines_about("isolation", done.stdout)[0].startswith("warn  isolation: QEMU runs as root")


def test_check_fails_and_says_what_to_do_when_files_are_missing(home: Path) -> None:
    (home / "vmlinux").unlink()
    (home / "qemu").unlink()
    done = run("--config", str(home / "configuration.toml"), "check")
    assert done.returncode == 1
    assert done.stderr == "ERROR: System is not capable of running Kata Containers\n"
    for key, path in (("kernel", "vmlinux"), ("path", "qemu")):
        where = f"{home}/configuration.toml: hypervisor.qemu.{key} = {home}/{path}"
        text = f"fail  files: {where}: No such file or directory"
        at = done.stdout.splitlines().index(text)
        assert done.stdout.splitlines()[at + 1].startswith("      -> ")


def test_check_goes_on_after_a_configuration_that_cannot_be_read(home: Path) -> None:
    (home / "configuration.toml").write_text("[runtime]\nenable_debug = 1")
    done = run("check", config=home / "configuration.toml")
    assert done.returncode == 1
    assert "runtime.enable_debug: got 1 (an integer), must be true or false" in done.stdout
    assert lines_about("privileges", done.stdout)


def test_check_tells_a_program_that_is_not_the_right_one(home: Path) -> None:
    (home / "qemu").write_text("#!/bin/sh\n")
    done = run("check", config=home / "configuration.toml")
    assert lines_about("QEMU", done.stdout) == [f"fail  QEMU: {home}/qemu --version prints nothing"]


def test_check_fails_for_memory_that_no_host_has(home: Path) -> None:
    (home / "configuration.toml").write_text(CONFIG.format(home=home).replace("= 256", "= 16777216"))
    done = run("check", config=home / "configuration.toml")
    assert lines_about("memory", done.stdout)[0].startswith("fail  memory: one VM takes up to 16777344 MiB")


@pytest.mark.parametrize(
    ("key", "value", "subject"),
    [("accelerator", "kvm", "accelerator"), ("agent_transport", "hybrid-vsock", "agent transport")],
)
def test_check_fails_when_the_configuration_demands_what_cannot_work(
    home: Path, key: str, value: str, subject: str
) -> None:
    """A QEMU that runs no machine has no KVM, whatever the host has; and QEMU has no hybrid vsock device."""
    lines = [line for line in CONFIG.format(home=home).splitlines() if not line.startswith(key)]
    (home / "configuration.toml").write_text("\n".join([*lines, f'{key} = "{value}"']))
    done = run("check", config=home / "configuration.toml")
    assert done.returncode == 1
    assert lines_about(subject, done.stdout)[0].startswith(
        f"fail  {subject}: {key if ' ' in subject else value}"
    )


def test_strict_takes_warnings_for_failures(home: Path) -> None:
    with (home / "configuration.toml").open("a") as file:
        file.write("enable_hugepages = true\n")
    done = run("check", "--strict", config=home / "configuration.toml")
    assert "hypervisor.qemu.enable_hugepages = true (a boolean) has no effect" in done.stdout
    assert done.returncode == 1


def write_manifest(home: Path) -> None:
    files = {
        "kernel": {"name": "vmlinux", "sha256": hashlib.sha256(b"kernel").hexdigest()},
        "image": {"name": "rootfs.erofs", "sha256": hashlib.sha256(b"image").hexdigest()},
    }
    (home / "guest.json").write_text(json.dumps({"kernel_version": "6.1.0", "files": files}))


def test_check_compares_the_guests_files_with_their_manifest(home: Path) -> None:
    write_manifest(home)
    config = home / "configuration.toml"
    assert lines_about("guest", run("check", config=config).stdout) == [
        f"ok    guest: Linux 6.1.0, as {home}/guest.json describes it"
    ]
    (home / "rootfs.erofs").write_bytes(b"another")
    assert lines_about("guest", run("check", config=config).stdout) == [
        f"warn  guest: {home}/rootfs.erofs is not the file that {home}/guest.json describes"
    ]


def test_env_is_the_same_in_toml_and_json_with_katas_sections_first(home: Path) -> None:
    write_manifest(home)
    config = home / "configuration.toml"
    as_json = json.loads(run("env", "--json", config=config).stdout)
    as_toml = tomllib.loads(run("kata-env", config=config).stdout)
    for facts in (as_json, as_toml):  # what changes from one moment to the next
        del facts["Host"]["Memory"]
    assert as_json == as_toml
    assert list(as_json) == [
        *("Kernel", "Meta", "Image", "Initrd", "Hypervisor", "Runtime", "Host", "Agent", "Guest", "Config")
    ]
    assert as_json["Kernel"]["Path"] == f"{home}/vmlinux"
    assert as_json["Hypervisor"]["Version"] == "qemu version 1.2.3"
    assert as_json["Hypervisor"]["Accelerator"] == "tcg"
    assert as_json["Runtime"]["Config"]["Path"] == str(config)
    assert as_json["Guest"]["kernel_version"] == "6.1.0"
    assert as_json["Config"]["hypervisor"]["default_memory"] == 256
    assert set(as_json["Config"]["hypervisor"]) == {key.name for key in keys(HypervisorConfig)}


def test_env_lists_the_keys() -> None:
    lines = run("env", "--keys").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("hypervisor.qemu.accelerator: ")]
    assert line.endswith('(one of "auto", "kvm", "tcg"; default "auto", not in Kata)')


def test_an_error_is_one_line_and_exit_status_1(home: Path) -> None:
    done = run("--kata-config", str(home / "nothing.toml"), "env")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f'kata-runtime: config file "{home}/nothing.toml" of ConfigPath or --config: '
        "No such file or directory\n"
    )


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cli", "env", "--keys"],
            env=env,
            stdout=write_end,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")
