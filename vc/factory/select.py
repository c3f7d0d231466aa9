"""Which factory the configuration asks for. Others are imported only if they are."""

from __future__ import annotations

from vc.config import Config
from vc.factory import Factory
from vc.factory.direct import DirectFactory


def make_factory(config: Config) -> Factory:
    """Return the factory of VMs. `config` is that of all pods, before any pod's annotations."""
    factory: Factory = DirectFactory()
    if config.factory.enable_template:
        from vc.factory.template import template_factory

        factory = template_factory(config)
    if config.factory.vm_cache_number:
        from vc.factory.cache import cache_factory

        factory = cache_factory(config, factory)
    return factory
