"""The measurements of scripts/bench: medians of repeated runs, printed and written as JSON.

What is compared is measured in turns (bare, ours, runc, bare, ...), so that a machine that gets slower or
faster meanwhile does so for all of them.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_bare import boot, machine_options, serial_throughput
from lib_starts import (
    CACHE,
    COLD,
    PHASES,
    RUNC,
    SHIM,
    TEMPLATE,
    VIRTIOFSD,
    VMM,
    kinds,
    measure_start,
    memory_of,
    start_at_once,
)

from tests.harness.cache import Cache
from tests.harness.containerd import Containerd
from tests.harness.processes import processes_of

ROWS = ("running", "starts", "memory", "many")
KINDS = (COLD, TEMPLATE, CACHE)
AT_ONCE = (1, 5, 10)
PARTS = (VMM, VIRTIOFSD, SHIM)
STREAM_MIB = 200
START_TIMEOUT = 30.0


@dataclass(slots=True)
class Results:
    """Samples by name."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, unit: str, value: float) -> None:
        """Note one sample."""
        self.samples.setdefault(name, []).append(value)
        self.units[name] = unit

    def median(self, name: str) -> float:
        """Return the figure that counts."""
        return statistics.median(self.samples[name])


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for one figure."""

    name: str
    text: str
    is_met: Callable[[float], bool]


TARGETS = [
    Target("cold ctr run / bare boot to agent ready", "at most 1.6", lambda value: value <= 1.6),
    Target("start prints its address", "under 80 ms", lambda value: value < 80),
    Target("shim PSS", "under 45 MB", lambda value: value < 45),
    Target("stdout / raw virtio-serial", "at least 0.30", lambda value: value >= 0.30),
    Target("template / cold", "at most 0.35", lambda value: value <= 0.35),
    Target("cache / cold", "at most 0.25", lambda value: value <= 0.25),
    Target("cache / runc", "at most 8", lambda value: value <= 8),
    Target("VMM PSS, template / cold", "at most 1", lambda value: value <= 1),
    Target("VMM PSS, cache / cold", "at most 1", lambda value: value <= 1),
    Target("failures of pods that were started at once", "none", lambda value: value == 0),
]


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shim", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS), help="where VMs come from, of %(default)s")
    parser.add_argument("--rows", default=",".join(ROWS), help="what is measured, of %(default)s")
    options = parser.parse_args()
    rows, wanted = chosen(parser, options.rows, ROWS), chosen(parser, options.kinds, KINDS)
    results = Results()
    with kinds([*wanted, RUNC]) as found:
        if "running" in rows:
            measure_running_container(results, options.shim, found, options.runs)
        if "starts" in rows:
            measure_starts(results, found, options.runs)
        if "memory" in rows:
            measure_memory(results, found)
        if "many" in rows:
            measure_many(results, found)
    add_ratios(results)
    report(results)
    print("\n" + "\n".join(table(results, [*wanted, RUNC])))
    options.json.write_text(json.dumps(as_json(results, options.runs), indent=2) + "\n")
    print(f"\n{options.json}")
    return 0


def note(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def chosen(parser: argparse.ArgumentParser, given: str, known: Sequence[str]) -> list[str]:
    names = given.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    return [name for name in known if name in names]


def measure_running_container(
    results: Results, shim: Path, found: Mapping[str, Containerd], runs: int
) -> None:
    """What does not depend on how the pod was started."""
    kata, runc = found[COLD], found[RUNC]
    with kata.running() as container:
        machine = machine_options(vmm_arguments(kata, container))
        note("exec, stdout and memory with a running container")
        measure_running(results, "ours", kata, container, runs)
        note("start")
        for _ in range(runs):
            measure_address(results, shim, kata, container)
    with runc.running() as container:
        measure_running(results, "runc", runc, container, runs)
    note("bare boots and raw virtio-serial")
    for _ in range(runs):
        bare = boot(machine)
        results.add("bare boot to the agent's first instruction", "s", bare.first_instruction)
        results.add("bare boot to agent ready", "s", bare.agent_ready)
    for _ in range(min(runs, 3)):
        results.add("raw virtio-serial", "MiB/s", serial_throughput(machine, STREAM_MIB))
    for _ in range(runs):
        results.add("import of the shim's server", "ms", import_time(shim))


def measure_starts(results: Results, found: Mapping[str, Containerd], runs: int) -> None:
    """Start a container of each kind, in turns."""
    for number in range(runs):
        note(f"starts, run {number + 1} of {runs}")
        for kind, containerd in found.items():
            if kind == CACHE:
                Cache(containerd).wait_ready()
            start = measure_start(containerd)
            results.add(f"ctr run --rm, {kind}", "s", start.done)
            results.add(f"ctr run, first byte, {kind}", "s", start.first_byte)
            for phase, seconds in start.phases.items():
                results.add(f"{kind}: {phase}", "ms", 1000 * seconds)


def measure_memory(results: Results, found: Mapping[str, Containerd]) -> None:
    """Weigh the processes of one pod of each kind."""
    note("memory of a pod")
    for kind, containerd in found.items():
        if kind == CACHE:
            Cache(containerd).wait_ready()
        if kind == RUNC:
            continue
        with containerd.running():
            sizes = memory_of(containerd)
        for program in PARTS:
            for name, value in zip(("RSS", "PSS"), sizes[program], strict=True):
                results.add(f"{program} {name}, {kind}", "MB", value)


def measure_many(results: Results, found: Mapping[str, Containerd]) -> None:
    """Start several pods at once."""
    for kind, containerd in found.items():
        for count in AT_ONCE:
            note(f"{count} pods at once, {kind}")
            if kind == CACHE:
                Cache(containerd).wait_ready()
            many = start_at_once(containerd, count)
            results.add(f"{count} at once, {kind}: all have printed", "s", many.seconds)
            results.add(f"{count} at once, {kind}: failures", "", many.failures)
            results.add(f"{count} at once, {kind}: PSS of all", "MB", many.memory)


def vmm_arguments(kata: Containerd, container: str) -> list[str]:
    data = Path(f"/proc/{kata.task_pid(container)}/cmdline").read_bytes()
    return [word.decode() for word in data.split(b"\0")[:-1]]


def measure_running(results: Results, who: str, containerd: Containerd, container: str, runs: int) -> None:
    for _ in range(runs):
        results.add(f"exec, {who}", "ms", 1000 * timed(lambda: containerd.exec(container, "true")))
    for _ in range(min(runs, 3)):
        results.add(f"stdout, {who}", "MiB/s", stdout_throughput(containerd, container))
        results.add(f"stdin, {who}", "MiB/s", stdin_throughput(containerd, container))
    for name, value in shim_memory(containerd, container).items():
        results.add(f"shim {name}, {who}" if who != "ours" else f"shim {name}", "MB", value)


def stdout_throughput(containerd: Containerd, container: str) -> float:
    """Return MiB/s through fifo and client, from the first byte to the last."""
    script = f"dd if=/dev/zero bs=64k count={STREAM_MIB * 16} 2>/dev/null"
    client = containerd.popen(*containerd.exec_arguments(container, "sh", "-c", script))
    assert client.stdout is not None
    descriptor = client.stdout.fileno()
    os.read(descriptor, 1 << 20)
    began = time.monotonic()
    received = 0
    while size := len(os.read(descriptor, 1 << 20)):
        received += size
    elapsed = time.monotonic() - began
    client.communicate()
    return received / elapsed / (1 << 20)


def stdin_throughput(containerd: Containerd, container: str) -> float:
    """Return MiB/s through client and fifo, until the process has read the last byte."""
    script = "echo ready; dd of=/dev/null bs=64k 2>/dev/null; echo done"
    client = containerd.popen(
        *containerd.exec_arguments(container, "sh", "-c", script), stdin=subprocess.PIPE
    )
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdout.readline()
    block = bytes(1 << 20)
    began = time.monotonic()
    for _ in range(STREAM_MIB):
        client.stdin.write(block)
    client.stdin.close()
    client.stdout.readline()
    elapsed = time.monotonic() - began
    client.wait()
    return STREAM_MIB / elapsed


def shim_memory(containerd: Containerd, container: str) -> dict[str, float]:
    """Return RSS and PSS of the process that serves `container`, in MB (10^6 bytes)."""
    for process in processes_of(containerd.directory):
        if "shim" in process.argv and container in process.argv:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            sizes = {line.split()[0].rstrip(":"): line.split()[1] for line in text.splitlines()[1:]}
            return {name: int(sizes[key]) * 1024 / 1e6 for name, key in (("RSS", "Rss"), ("PSS", "Pss"))}
    raise RuntimeError(f"no process serves {container}")


def measure_address(results: Results, shim: Path, kata: Containerd, container: str) -> None:
    """Call `start` as containerd does, in a bundle that is a copy of a running container's."""
    tasks = kata.directory / "state" / "io.containerd.runtime.v2.task" / kata.namespace
    with tempfile.TemporaryDirectory(prefix="start-", dir=kata.directory / "tmp") as bundle:
        shutil.copy(tasks / container / "config.json", bundle)
        identity = Path(bundle).name
        common = ["-namespace", kata.namespace, "-address", kata.address]
        common += ["-publish-binary", "containerd", "-id", identity]
        environ = {**kata.environ, "TTRPC_ADDRESS": f"{kata.address}.ttrpc"}
        before = {process.pid for process in processes_of(kata.directory)}
        began = time.monotonic()
        # Both outputs are one pipe, read to its end: containerd goes on only then.
        started = subprocess.run(
            [shim, *common, "start"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=bundle,
            env=environ,
            timeout=START_TIMEOUT,
            check=False,
        )
        results.add("start prints its address", "ms", 1000 * (time.monotonic() - began))
        if not started.stdout.startswith(b"unix://"):
            raise RuntimeError(f"start failed: {started.stdout!r}")
        for process in processes_of(kata.directory):
            if process.pid not in before and identity in process.argv:
                os.kill(process.pid, 9)
        subprocess.run(
            [shim, *common, "-bundle", bundle, "delete"],
            cwd=bundle,
            env=environ,
            capture_output=True,
            check=True,
        )


def import_time(shim: Path) -> float:
    """Return the milliseconds that `import shim.serve` takes in an interpreter as the command starts it."""
    text = shim.read_text()
    python = text.split("'")[text.split("'").index(":") + 2]
    paths = next(line for line in text.splitlines() if line.startswith("sys.path"))
    code = f"import sys, time; {paths}; began = time.perf_counter(); import shim.serve; "
    code += "print(1000 * (time.perf_counter() - began))"
    argv = [python, "-I", "-S", "-W", "ignore", "-c", code]
    return float(subprocess.run(argv, capture_output=True, check=True, text=True).stdout)


def add_ratios(results: Results) -> None:
    ratios = [
        ("cold ctr run / bare boot to agent ready", "ctr run --rm, cold", "bare boot to agent ready"),
        ("stdout / raw virtio-serial", "stdout, ours", "raw virtio-serial"),
        ("template / cold", "ctr run --rm, template", "ctr run --rm, cold"),
        ("cache / cold", "ctr run --rm, cache", "ctr run --rm, cold"),
        ("cache / runc", "ctr run --rm, cache", "ctr run --rm, runc"),
        ("VMM PSS, template / cold", "VMM PSS, template", "VMM PSS, cold"),
        ("VMM PSS, cache / cold", "VMM PSS, cache", "VMM PSS, cold"),
    ]
    for name, above, below in ratios:
        if above in results.samples and below in results.samples:
            results.add(name, "", results.median(above) / results.median(below))
    failures = [sum(values) for name, values in results.samples.items() if name.endswith(": failures")]
    if failures:
        results.add("failures of pods that were started at once", "", sum(failures))


def report(results: Results) -> None:
    targets = {target.name: target for target in TARGETS}
    for name in results.samples:
        value = results.median(name)
        line = f"{name:46} {value:9.2f} {results.units[name]:6}"
        if target := targets.get(name):
            line += f" {target.text}: {'met' if target.is_met(value) else 'MISSED'}"
        print(line.rstrip())


def table(results: Results, columns: Sequence[str]) -> list[str]:
    """Return what there is for each kind of start as a table in Markdown, as the README has it."""
    rows = {
        "`ctr run --rm`": "ctr run --rm, {}",
        "… until the first byte of output": "ctr run, first byte, {}",
        **{phase: "{}: " + phase for phase, _ in PHASES},
        **{f"{part}, {size}": f"{part} {size}, {{}}" for part in PARTS for size in ("RSS", "PSS")},
        **{
            f"{count} at once, all have printed": f"{count} at once, {{}}: all have printed"
            for count in AT_ONCE
        },
        **{f"{count} at once, PSS of all": f"{count} at once, {{}}: PSS of all" for count in AT_ONCE},
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for title, name in rows.items():
        cells = [cell(results, name.format(column)) for column in columns]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def cell(results: Results, name: str) -> str:
    if name not in results.samples:
        return ""
    digits = 2 if results.units[name] == "s" else 0
    return f"{results.median(name):.{digits}f} {results.units[name]}"


def as_json(results: Results, runs: int) -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "runs": runs,
        "results": {
            name: {"median": results.median(name), "unit": results.units[name], "samples": samples}
            for name, samples in results.samples.items()
        },
        "targets": {
            target.name: {"limit": target.text, "met": target.is_met(results.median(target.name))}
            for target in TARGETS
            if target.name in results.samples
        },
    }


if __name__ == "__main__":
    sys.exit(main())
