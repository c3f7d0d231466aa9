"""`kata-runtime factory`: make, look at and remove what VMs come from: a template, and VMs that wait."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import time
from dataclasses import replace
from pathlib import Path

import trio

from cli.cost import host_memory
from vc.config import Config, load
from vc.errors import VCError
from vc.factory.identity import identify
from vc.factory.templates import BrokenTemplate, ForeignTemplate, Manifest, Templates
from vc.hypervisor.configure import vm_config
from vc.leaks import refuses

NOT_ENABLED = "vm factory or VMCache is not enabled"  # these texts are Kata's
INITIALIZED = "vm factory initialized"
DESTROYED = "vm factory destroyed"
ON, OFF, STATUS_NOT_ENABLED = "vm factory is on", "vm factory is off", "vm factory not enabled"

MIB = 1 << 20
PATIENCE = 10  # times as long as a pod may take; it boots at the lowest priority
LOWEST_PRIORITY = 19  # sched(7), "nice"
END_TIMEOUT = 20.0  # seconds for the cache to end all of its VMs
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run_factory(args: argparse.Namespace) -> int:
    """Run one action."""
    config = load(args.config)
    templates = Templates(config.factory.template_path)
    if args.action == "init":
        return _init(config, templates, background=args.background)
    if args.action == "destroy":
        return _destroy(config, templates)
    return _status(config, templates)


def _init(config: Config, templates: Templates, *, background: bool) -> int:
    cached = config.factory.vm_cache_number > 0 and not background
    if not config.factory.enable_template and not cached:
        print(NOT_ENABLED)
        return 0
    if background:
        _step_back()
    made = True
    if config.factory.enable_template:
        made = _make_template(config, templates, background=background)
    if cached:
        _run_cache(config, templates)
    elif made:
        print(INITIALIZED)
    return 0


def _make_template(config: Config, templates: Templates, *, background: bool) -> bool:
    """Make the template, unless there is one. False if another process does."""
    from vc.factory.maker import make_template

    base = vm_config(config)
    if background:
        base = replace(base, dial_timeout=base.dial_timeout * PATIENCE)
    return trio.run(lambda: make_template(base, templates, wait=not background)) is not None


def _run_cache(config: Config, templates: Templates) -> None:
    """Keep VMs ready until somebody ends it."""
    from vc.factory import Factory
    from vc.factory.cacheserver import Pool, run_cache
    from vc.factory.direct import DirectFactory
    from vc.factory.handover import cache_key
    from vc.factory.maker import check_pluggable
    from vc.factory.template import TemplateFactory

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    base = vm_config(config)
    check_pluggable(base)
    patient = replace(base, dial_timeout=base.dial_timeout * PATIENCE)
    factory: Factory = DirectFactory(kept=True)
    if config.factory.enable_template:
        factory = TemplateFactory(templates, patient, kept=True)
    pool = Pool(factory, patient, config.factory.vm_cache_number)

    def on_ready() -> None:
        print(INITIALIZED, flush=True)

    key = cache_key(base)
    trio.run(lambda: run_cache(pool, key, config.factory.vm_cache_endpoint, on_ready=on_ready))


def _destroy(config: Config, templates: Templates) -> int:
    if config.factory.vm_cache_number and config.factory.vm_cache_endpoint.exists():
        _end_cache(config.factory.vm_cache_endpoint)
    with templates.locked(wait=True):
        templates.remove_all()
    print(DESTROYED)
    return 0


def _end_cache(endpoint: Path) -> None:
    """Tell the cache to end, and wait until it has; remove the socket of one that was killed."""
    from vc.factory.cachedoor import quit_cache, status_of
    from vc.factory.handover import handover_path

    try:
        server = os.pidfd_open(status_of(endpoint).pid)
        try:
            quit_cache(endpoint)
            if not select.select([server], [], [], END_TIMEOUT)[0]:
                raise VCError(f"the VM cache at {str(endpoint)!r} did not end within {END_TIMEOUT:g} s")
        finally:
            os.close(server)
    except (VCError, ProcessLookupError):
        if not refuses(endpoint):
            raise
        for path in (endpoint, handover_path(endpoint)):
            path.unlink(missing_ok=True)


def _step_back() -> None:
    """Let everybody else go first. Not SCHED_IDLE: on a busy host that would never end."""
    os.nice(LOWEST_PRIORITY)


def _status(config: Config, templates: Templates) -> int:
    if config.factory.vm_cache_number:
        _cache_status(config.factory.vm_cache_endpoint)
    if config.factory.enable_template:
        return _template_status(config, templates)
    if not config.factory.vm_cache_number:
        print(STATUS_NOT_ENABLED)
    return 0


def _cache_status(endpoint: Path) -> None:
    """Print what the cache has, in Kata's words, and what that costs."""
    from vc.factory.cachedoor import status_of

    if not endpoint.exists():
        print(f"VM cache server is off: {endpoint} does not exist")
        return
    try:
        status = status_of(endpoint)
    except VCError as exc:
        print(f"VM cache server is off: {exc}")
        return
    print(f"VM cache server pid = {status.pid}")
    for vm in status.vmstatus:
        print(f"VM pid = {vm.pid} Cpu = {vm.cpu} Memory = {vm.memory}MiB")
    for pid in [status.pid, *(vm.pid for vm in status.vmstatus)]:
        print(f"pid {pid} holds {host_memory(pid) / MIB:.0f} MiB of the host's memory")


def _template_status(config: Config, templates: Templates) -> int:
    key, _ = identify(vm_config(config))
    try:
        with templates.opened(key) as template:
            manifest = template.manifest if template is not None else None
    except (BrokenTemplate, ForeignTemplate) as exc:
        print(OFF)
        print(f"template {key} cannot be used: {exc}")
        return 0
    if manifest is None:
        print(OFF)
        _tell_failure(templates, key)
        return 0
    print(ON)
    print(_describe(templates, manifest))
    return 0


def _describe(templates: Templates, manifest: Manifest) -> str:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.made_at))
    return (
        f"template {templates.directory / manifest.key}: {manifest.vcpus} vCPUs, {manifest.memory_mib} MiB, "
        f"{(manifest.data_bytes + manifest.state_bytes) / MIB:.0f} MiB on disk, made {made}"
    )


def _tell_failure(templates: Templates, key: str) -> None:
    if failure := templates.failure(key):
        print(f"the last template failed {failure[0]:.0f} s ago: {failure[1]}", file=sys.stderr)
