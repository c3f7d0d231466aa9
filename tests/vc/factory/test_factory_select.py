"""The configuration names the factory; the direct one costs nothing more than before."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from vc.config import Config, FactoryConfig, HypervisorConfig
from vc.factory.cache import CacheFactory
from vc.factory.direct import DirectFactory
from vc.factory.select import make_factory
from vc.factory.template import TemplateFactory

CONFIG = Config(source=Path("/etc/some.toml"), hypervisor=HypervisorConfig(kernel=Path("/boot/vmlinux")))


def test_by_default_vms_are_booted() -> None:
    assert isinstance(make_factory(CONFIG), DirectFactory)


def test_a_template_is_asked_for(tmp_path: Path) -> None:
    config = replace(CONFIG, factory=FactoryConfig(enable_template=True, template_path=tmp_path))
    assert isinstance(make_factory(config), TemplateFactory)


def test_a_cache_is_asked_first() -> None:
    assert isinstance(make_factory(replace(CONFIG, factory=FactoryConfig(vm_cache_number=1))), CacheFactory)


def test_taking_vms_from_a_cache_needs_no_grpc() -> None:
    """It costs 40 ms and 9.5 MB in each shim."""
    code = "import sys, shim.serve, vc.factory.cache; sys.exit('grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_templates_are_imported_only_if_they_are_asked_for() -> None:
    code = (
        "import sys, vc.factory.select; sys.exit(any('vc.factory.template' in name for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
