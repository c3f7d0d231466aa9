"""Which containerd runtime an end-to-end test runs on.

The tests are written for kata. The same tests run on runc (KATA_E2E_RUNTIME=runc), the runtime that everybody
compares with: a test that fails there asks for something that containerd does not promise.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime's name for containerd, and what containerd's environment must say for it."""

    name: str
    is_vm: bool
    environ: Mapping[str, str] = field(default_factory=dict)
    run_dir: Path | None = None  # where it keeps its sandboxes, if it is ours


def runc() -> Runtime:
    return Runtime("io.containerd.runc.v2", is_vm=False)


def kata(directory: Path) -> Runtime:
    """Return this checkout's runtime with a configuration of its own in `directory`.

    The guest and the configuration are those of the build (KATA_OUT, default build/ at the root).
    """
    out = Path(os.environ.get("KATA_OUT", ROOT / "build"))
    base = Path(os.environ.get("KATA_E2E_CONF_FILE", out / "configuration.toml"))
    if not base.exists():
        raise FileNotFoundError(f"no configuration {str(base)!r}: run scripts/build_guest first")
    run_dir = directory / "vc"
    config = directory / "configuration.toml"
    config.write_text(with_run_dir(base.read_text(), run_dir))
    environ = {"PATH": f"{out / 'bin'}:{os.environ['PATH']}", "KATA_CONF_FILE": str(config)}
    return Runtime("io.containerd.kata.v2", is_vm=True, environ=environ, run_dir=run_dir)


def with_run_dir(text: str, run_dir: Path) -> str:
    """Return configuration `text` with [runtime] run_dir set to `run_dir`."""
    text = re.sub(r"(?m)^[ \t]*run_dir[ \t]*=.*\n", "", text)
    text, tables = re.subn(r"(?m)^\[runtime\][ \t]*(#.*)?$", f'[runtime]\nrun_dir = "{run_dir}"', text)
    if not tables:
        text += f'\n[runtime]\nrun_dir = "{run_dir}"\n'
    assert tomllib.loads(text)["runtime"]["run_dir"] == str(run_dir)
    return text
