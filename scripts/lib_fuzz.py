"""Run the fuzz targets with atheris, one process after the other, and say what came of it.

atheris never returns: each target's run is a process of its own, and this program, called without --run, is
the one that starts them, reads libFuzzer's statistics and prints one line for each.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Whose branches guide the fuzzer. The targets themselves decide what is called.
INSTRUMENTED = [
    "agent",
    "shim",
    "ttrpc",
    "vc",
    "yamux",
    "tests.harness.fuzz_lines",
    "tests.harness.fuzz_words",
]
MAX_INPUT = 4096  # bytes
RSS_LIMIT = 1024  # MiB: more is a finding of its own
UNIT_LIMIT = 10  # seconds for one input: more is one, too
GRACE = 60  # seconds beyond its share until a run counts as hung


def run_one(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, for ever or until libFuzzer's limits."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]  # only the fuzzer's environment has it

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.harness.fuzz import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name].run)
    atheris.Fuzz()


def names() -> list[str]:
    from tests.harness.fuzz import TARGETS

    return list(TARGETS)


def plant_seeds(name: str, corpus: Path) -> None:
    from tests.harness.fuzz import TARGETS

    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)


def fuzz(name: str, seconds: int, out: Path) -> bool:
    """Fuzz one target for some seconds; print what was reached. False if something was found."""
    corpus, findings = out / "corpus" / name, out / "findings"
    plant_seeds(name, corpus)
    findings.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}", f"-timeout={UNIT_LIMIT}"]
    argv = [sys.executable, __file__, "--run", name, *limits, f"-rss_limit_mb={RSS_LIMIT}"]
    argv += ["-print_final_stats=1", f"-artifact_prefix={findings}/{name}-", str(corpus)]
    began = time.monotonic()
    try:
        done = subprocess.run(
            argv,
            capture_output=True,  # atheris writes tracebacks to stdout
            text=True,
            errors="replace",
            timeout=seconds + GRACE,
            check=False,
        )
        said, status = done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: the fuzzer hangs", file=sys.stderr)
        return False
    runs = re.search(r"number_of_executed_units: (\d+)", said)
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", said)
    edges, features = coverage[-1] if coverage else ("?", "?")
    first = coverage[0][0] if coverage else "?"
    kept = len(list(corpus.iterdir()))
    print(
        f"{name:18} {time.monotonic() - began:6.0f} s {runs[1] if runs else '?':>9} runs"
        f"  {first:>5} -> {edges:>5} edges  {features:>6} features {kept:>5} inputs"
        f"  {'ok' if status == 0 else f'BROKEN (status {status})'}",
        flush=True,
    )
    if status != 0:
        print(done.stdout[-4000:], said[-1500:], sep="\n", file=sys.stderr)
    return status == 0


def main() -> int:
    if sys.argv[1:2] == ["--run"]:
        run_one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(prog="fuzz", description="fuzz what reads others' bytes")
    parser.add_argument(
        "-t", "--time", type=int, default=60, metavar="SECONDS", help="for all targets together"
    )
    parser.add_argument("--out", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names())}")
    args = parser.parse_args()
    unknown = set(args.targets) - set(names())
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    chosen = args.targets or names()
    share = max(1, args.time // len(chosen))
    os.environ["PYTHONHASHSEED"] = "0"  # a finding must be found again
    results = [fuzz(name, share, args.out) for name in chosen]  # a finding does not end the others
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
