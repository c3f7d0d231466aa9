"""`kata-runtime factory` without a template: what it says. Making one is tested end to end."""

from pathlib import Path

import pytest

from cli.__main__ import main


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("qemu", "kernel", "image", "virtiofsd"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def configure(files: Path, *, enabled: bool) -> list[str]:
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
