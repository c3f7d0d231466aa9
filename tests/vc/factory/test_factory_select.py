"""The configuration names the factory; the direct one costs nothing more than before."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from vc.config import Config, FactoryConfig, HypervisorConfig
from vc.factory.direct import DirectFactory
from vc.factory.select import make_factory
from vc.factory.template import TemplateFactory

CONFIG = Config(source=Path("/etc/some.toml"), hypervisor=HypervisorConfig(kernel=Path("/boot/vmlinux")))


def test_by_default_vms_are_booted() -> None:
    assert isinstance(make_factory(CONFIG), DirectFactory)


def test_a_template_is_asked_for(tmp_path: Path) -> None:
    config = replace(CONFIG, factory=FactoryConfig(enable_template=True, template_path=tmp_path))
    assert isinstance(make_factory(config), TemplateFactory)


def test_templates_are_imported_only_if_they_are_asked_for() -> None:
    code = (
        "import sys, vc.factory.select; sys.exit(any('vc.factory.template' in name for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
