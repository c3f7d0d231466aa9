"""`leaks`: what is left on the host of sandboxes that are gone, and its removal."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vc import leaks
from vc.config import load


def run(args: argparse.Namespace) -> int:
    """Print one line for each leak, removed or not; fail if one is left."""
    config = None if args.run_dir else load(args.config, check_files=False)
    run_dir = Path(args.run_dir) if config is None else config.runtime.run_dir
    containerd = args.containerd_address or os.environ.get("CONTAINERD_ADDRESS") or leaks.CONTAINERD
    found = leaks.find(
        run_dir.resolve(),
        containerd=containerd,
        templates=config.factory.template_path if config else None,
        cache_socket=config.factory.vm_cache_endpoint if config else None,
    )
    if not found:
        print(f"nothing is left behind in {str(run_dir)!r}")
        return 0
    if not args.fix:
        print(*found, sep="\n")
        return 1
    status = 0
    for leak, failure in leaks.remove(found):
        print(f"NOT removed: {leak}: {failure}" if failure else f"removed {leak}")
        status |= bool(failure)
    return status
