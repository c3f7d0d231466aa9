"""The second half of scripts/soak: cycles on a containerd of their own, and what they cost."""

import argparse
import secrets
import sys
import time
from pathlib import Path

from tests.harness import runtimes
from tests.harness.containerd import Containerd
from tests.harness.soak import Soak, SoakError, use_template

HEAD = 6000  # characters of a failure's report that are printed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cycles", type=int)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--template", action="store_true")
    parser.add_argument("--only", default="", help="part of the name of the kinds of life to choose from")
    parser.add_argument("--journal", type=Path, required=True)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    with Containerd(runtimes.kata) as containerd:
        if options.template:
            use_template(containerd, containerd.runtime)
        soak = Soak(containerd, options.seed, journal=options.journal, only=options.only, tell=tell)
        try:
            soak.run(options.first, options.cycles)
        except SoakError as exc:
            report = options.journal.with_suffix(".failure")
            report.write_text(f"{exc}\n")
            print(f"{str(exc)[:HEAD]}\n... the rest is in {report}", file=sys.stderr)
            return 1
    summarize(soak, time.monotonic() - began)
    return 0


def tell(text: str) -> None:
    print(text, flush=True)


def summarize(soak: Soak, seconds: float) -> None:
    for name, count in sorted(soak.counts.items()):
        print(f"{name:34} {count:6}")
    for name, samples in soak.figures.samples.items():
        growth = soak.figures.growth(name)
        print(f"{name:34} {samples[0]:10.0f} to {samples[-1]:10.0f}, {growth:+8.2f} a cycle")
    print(f"nothing wrong, nothing left in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
