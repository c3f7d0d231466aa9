"""What docs/install.md tells an administrator to write is understood by what reads it."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.harness.runtimes import ROOT, build
from tests.skips import NotToBeHad

PAGE = (ROOT / "docs" / "install.md").read_text()
OUT = build()


def snippets(language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", PAGE)


@pytest.mark.parametrize(
    ("suite", "version"),
    [("", 2), ("trixie", 2), ("sid", 2), ("sid", 3)],
    ids=["1.6", "1.7", "2.x with an old file", "2.x"],
)
def test_containerd_takes_the_runtime_for_kubernetes(suite: str, version: int, tmp_path: Path) -> None:
    programs = OUT / "containerd" / suite / "usr" / "bin"
    containerd = shutil.which("containerd", path=str(programs) if suite else None)
    if containerd is None:
        text = f"there is no containerd of {suite or 'this machine'}"
        raise NotToBeHad(text) if suite == "sid" else pytest.skip.Exception(text)
    written = dict(zip((2, 3), snippets("toml"), strict=True))[version]
    config = tmp_path / "config.toml"
    config.write_text(f"version = {version}\n{written}")
    argv = [containerd, "--config", str(config), "config", "dump"]
    read = tomllib.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    plugins = [
        plugin["containerd"]["runtimes"]["kata"]
        for plugin in read["plugins"].values()
        if "kata" in plugin.get("containerd", {}).get("runtimes", {})
    ]
    assert len(plugins) == 1
    assert plugins[0]["runtime_type"] == "io.containerd.kata.v2"
    assert plugins[0]["privileged_without_host_devices"] is True
    assert plugins[0]["pod_annotations"] == ["io.katacontainers.*"]


def test_the_snippet_for_docker_names_the_runtime() -> None:
    [snippet] = snippets("json")
    assert json.loads(snippet)["runtimes"]["kata"] == {"runtimeType": "io.containerd.kata.v2"}
