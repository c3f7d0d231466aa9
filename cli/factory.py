"""`kata-runtime factory`: make, look at and remove the template that VMs are started from."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace

import trio

from vc.config import Config, load
from vc.factory.identity import identify
from vc.factory.templates import BrokenTemplate, ForeignTemplate, Manifest, Templates
from vc.hypervisor.configure import vm_config

NOT_ENABLED = "vm factory or VMCache is not enabled"  # these texts are Kata's
INITIALIZED = "vm factory initialized"
DESTROYED = "vm factory destroyed"
ON, OFF, STATUS_NOT_ENABLED = "vm factory is on", "vm factory is off", "vm factory not enabled"

MIB = 1 << 20
PATIENCE = 10  # times as long as a pod may take; it boots at the lowest priority
LOWEST_PRIORITY = 19  # sched(7), "nice"


def run_factory(args: argparse.Namespace) -> int:
    """Run one action."""
    config = load(args.config)
    templates = Templates(config.factory.template_path)
    if args.action == "init":
        return _init(config, templates, background=args.background)
    if args.action == "destroy":
        with templates.locked(wait=True):
            templates.remove_all()
        print(DESTROYED)
        return 0
    return _status(config, templates)


def _init(config: Config, templates: Templates, *, background: bool) -> int:
    if not config.factory.enable_template:
        print(NOT_ENABLED)
        return 0
    if background:
        _step_back()
    from vc.factory.maker import make_template

    base = vm_config(config)
    if background:
        base = replace(base, dial_timeout=base.dial_timeout * PATIENCE)
    made = trio.run(lambda: make_template(base, templates, wait=not background))
    if made is not None:
        print(INITIALIZED)
    return 0


def _step_back() -> None:
    """Let everybody else go first. Not SCHED_IDLE: on a busy host that would never end."""
    os.nice(LOWEST_PRIORITY)


def _status(config: Config, templates: Templates) -> int:
    if not config.factory.enable_template:
        print(STATUS_NOT_ENABLED)
        return 0
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
