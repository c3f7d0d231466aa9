"""`kata-runtime factory` without a template: what it says. Making one is tested end to end."""

import os
from pathlib import Path

import pytest

from cli.__main__ import main
from cli.cost import host_memory, parse_private
from vc.unixsock import listen


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("qemu", "kernel", "image", "virtiofsd"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def configure(files: Path, *, enabled: bool, cached: int = 0) -> list[str]:
    path = files / "configuration.toml"
    path.write_text(
        f"""
[hypervisor.qemu]
path = "{files}/qemu"
kernel = "{files}/kernel"
image = "{files}/image"
virtio_fs_daemon = "{files}/virtiofsd"
accelerator = "tcg"
[factory]
enable_template = {str(enabled).lower()}
template_path = "{files}/template"
vm_cache_number = {cached}
vm_cache_endpoint = "{files}/cache.sock"
"""
    )
    return ["--config", str(path), "factory"]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("init", "vm factory or VMCache is not enabled\n"),
        ("status", "vm factory not enabled\n"),
        ("destroy", "vm factory destroyed\n"),
    ],
)
def test_a_factory_that_is_not_enabled(
    files: Path, capsys: pytest.CaptureFixture[str], action: str, said: str
) -> None:
    assert main([*configure(files, enabled=False), action]) == 0
    assert capsys.readouterr().out == said


def test_a_factory_without_a_template_is_off(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*configure(files, enabled=True), "status"]) == 0
    assert capsys.readouterr().out == "vm factory is off\n"


def test_a_template_that_cannot_be_made_is_an_error_that_status_repeats(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in this configuration is no QEMU."""
    argv = configure(files, enabled=True)
    assert main([*argv, "init"]) == 1
    told = capsys.readouterr().err
    assert "did not boot" in told or "cannot be started" in told
    assert main([*argv, "status"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "vm factory is off\n"
    assert "the last template failed" in captured.err
    assert sorted(path.name for path in (files / "template").iterdir()) == ["failed.json", "lock"]


def test_an_action_is_required(files: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(configure(files, enabled=True))


def test_a_cache_that_does_not_run_is_off(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*configure(files, enabled=False, cached=2), "status"]) == 0
    assert capsys.readouterr().out == f"VM cache server is off: {files}/cache.sock does not exist\n"


def test_the_socket_of_a_cache_that_was_killed_is_removed_on_demand_only(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = files / "cache.sock"
    listen(endpoint).close()
    argv = configure(files, enabled=False, cached=2)
    assert main([*argv, "status"]) == 0
    assert f"VM cache server is off: the VM cache at '{endpoint}'" in capsys.readouterr().out
    assert main([*argv, "init"]) == 1
    refused = capsys.readouterr().err
    assert f"{endpoint} already exist.  Please stop running VMCache server and remove {endpoint}" in refused
    assert main([*argv, "destroy"]) == 0
    assert capsys.readouterr().out == "vm factory destroyed\n"
    assert not endpoint.exists()


def test_a_cache_whose_first_vm_cannot_be_made_is_an_error(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in this configuration is no QEMU."""
    assert main([*configure(files, enabled=False, cached=1), "init"]) == 1
    assert "did not boot" in capsys.readouterr().err
    assert not (files / "cache.sock").exists()


def test_background_makes_no_cache(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*configure(files, enabled=False, cached=1), "init", "--background"]) == 0
    assert capsys.readouterr().out == "vm factory or VMCache is not enabled\n"


def test_what_a_process_costs_counts_its_memory_files_whole_and_once() -> None:
    text = "Rss: 9 kB\nPss: 8 kB\nPss_Anon:  3 kB\nPss_File: 2 kB\nPss_Shmem: 700 kB\nSwapPss: 1 kB\n"
    assert parse_private(text) == 5 * 1024
    before = host_memory(os.getpid())
    memory = os.memfd_create("guest-memory")
    try:
        os.write(memory, bytes(20 << 20))
        second = os.dup(memory)
        assert 19 << 20 < host_memory(os.getpid()) - before < 30 << 20
        os.close(second)
    finally:
        os.close(memory)
    assert host_memory(2**22 + 1) == 0, "there is no such process: proc(5), pid_max"
