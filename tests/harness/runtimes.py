"""Which containerd runtime an end-to-end test runs on.

The tests are written for kata. The same tests run on runc (KATA_E2E_RUNTIME=runc), the runtime that everybody
compares with: a test that fails there asks for something that containerd does not promise.
"""

import os
import re
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


FACTORY_TIMEOUT = 120.0  # seconds to make a template, with other machines beside it


class Start(Enum):
    """Where a pod's VM comes from."""

    DIRECT = "direct"
    TEMPLATE = "template"
    CACHE = "cache"  # which needs a server: see `tests.harness.cache`


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime's name for containerd, and what containerd's environment must say for it."""

    name: str
    is_vm: bool
    environ: Mapping[str, str] = field(default_factory=dict)
    run_dir: Path | None = None  # where it keeps its sandboxes, if it is ours
    template_path: Path | None = None  # where its templates are

    @property
    def config(self) -> Path:
        """The configuration, if it is ours."""
        return Path(self.environ["KATA_CONF_FILE"])

    @property
    def cache_endpoint(self) -> Path:
        """Where its cache serves, in a directory of its own."""
        return self.config.parent / "cache" / "cache.sock"

    def start_from(self, start: Start) -> None:
        """Let the VMs of sandboxes that are created from now on come from there."""
        if start is Start.DIRECT:
            set_factory(self.config, enable_template=False)
            return
        assert self.template_path is not None
        keys: dict[str, str | int] = {"enable_template": True, "template_path": str(self.template_path)}
        if start is Start.CACHE:
            keys |= {"vm_cache_number": 1, "vm_cache_endpoint": str(self.cache_endpoint)}
        set_factory(self.config, **keys)

    def factory(self, action: str) -> str:
        """Run `kata-runtime factory ACTION` and return what it prints. Raises: subprocess.SubprocessError."""
        environ = {**os.environ, **self.environ}
        argv = ["kata-runtime", "--config", str(self.config), "factory", action]
        done = subprocess.run(
            argv, env=environ, stdout=subprocess.PIPE, timeout=FACTORY_TIMEOUT, check=True, text=True
        )
        return done.stdout


def build() -> Path:
    """Return where the guest and the commands are built."""
    return Path(os.environ.get("KATA_OUT", ROOT / "build"))


def search_path() -> str:
    """Return the PATH on which this checkout's shim is found."""
    return f"{build() / 'bin'}:{os.environ['PATH']}"


def runc() -> Runtime:
    return Runtime("io.containerd.runc.v2", is_vm=False)


def kata(directory: Path, *, template_path: Path | None = None) -> Runtime:
    """Return this checkout's runtime with a configuration of its own in `directory`.

    The guest and the configuration are those of the build (KATA_OUT, default build/ at the root). VMs are
    booted until `start_from` says otherwise.
    """
    out = build()
    base = Path(os.environ.get("KATA_E2E_CONF_FILE", out / "configuration.toml"))
    if not base.exists():
        raise FileNotFoundError(f"no configuration {str(base)!r}: run scripts/build_guest first")
    run_dir = directory / "vc"
    config = directory / "configuration.toml"
    config.write_text(with_run_dir(base.read_text(), run_dir))
    environ = {"PATH": search_path(), "KATA_CONF_FILE": str(config)}
    runtime = Runtime(
        "io.containerd.kata.v2", is_vm=True, environ=environ, run_dir=run_dir, template_path=template_path
    )
    runtime.start_from(Start.DIRECT)
    return runtime


def set_factory(config: Path, **keys: str | int) -> None:
    """Replace the table [factory] of a configuration, for the sandboxes that are created from now on."""
    text = re.sub(r"(?ms)^\[factory\].*?(?=^\[|\Z)", "", config.read_text())
    lines = [f"{name} = {_toml(value)}" for name, value in keys.items()]
    new = config.with_suffix(".new")  # others may read it meanwhile
    new.write_text("\n".join([text, "[factory]", *lines, ""]))
    new.replace(config)


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def with_run_dir(text: str, run_dir: Path) -> str:
    """Return configuration `text` with [runtime] run_dir set to `run_dir`."""
    text = re.sub(r"(?m)^[ \t]*run_dir[ \t]*=.*\n", "", text)
    text, tables = re.subn(r"(?m)^\[runtime\][ \t]*(#.*)?$", f'[runtime]\nrun_dir = "{run_dir}"', text)
    if not tables:
        text += f'\n[runtime]\nrun_dir = "{run_dir}"\n'
    assert tomllib.loads(text)["runtime"]["run_dir"] == str(run_dir)
    return text
