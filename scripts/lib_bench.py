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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_bare import boot, machine_options, serial_throughput

from tests.harness import runtimes
from tests.harness.containerd import Containerd
from tests.harness.processes import processes_of

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
    options = parser.parse_args()
    results = Results()
    with (
        Containerd(runtimes.kata, level="info") as kata,
        Containerd(lambda _: runtimes.runc(), level="info") as runc,
    ):
        with kata.running() as container:
            machine = machine_options(vmm_arguments(kata, container))
            note("exec, stdout and memory with a running container")
            measure_running(results, "ours", kata, container, options.runs)
            note("start")
            for _ in range(options.runs):
                measure_start(results, options.shim, kata, container)
        with runc.running() as container:
            measure_running(results, "runc", runc, container, options.runs)
        for number in range(options.runs):
            note(f"cold start, run {number + 1} of {options.runs}")
            measure_cold(results, machine, kata, runc)
    note("raw virtio-serial")
    for _ in range(min(options.runs, 3)):
        results.add("raw virtio-serial", "MiB/s", serial_throughput(machine, STREAM_MIB))
    for _ in range(options.runs):
        results.add("import of the shim's server", "ms", import_time(options.shim))
    add_ratios(results)
    report(results)
    options.json.write_text(json.dumps(as_json(results, options.runs), indent=2) + "\n")
    print(f"\n{options.json}")
    return 0


def note(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def vmm_arguments(kata: Containerd, container: str) -> list[str]:
    data = Path(f"/proc/{kata.task_pid(container)}/cmdline").read_bytes()
    return [word.decode() for word in data.split(b"\0")[:-1]]


def measure_running(results: Results, who: str, containerd: Containerd, container: str, runs: int) -> None:
    for _ in range(runs):
        results.add(f"exec, {who}", "ms", 1000 * timed(lambda: containerd.exec(container, "true")))
    for _ in range(min(runs, 3)):
        results.add(f"stdout, {who}", "MiB/s", stdout_throughput(containerd, container))
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


def shim_memory(containerd: Containerd, container: str) -> dict[str, float]:
    """Return RSS and PSS of the process that serves `container`, in MB (10^6 bytes)."""
    for process in processes_of(containerd.directory):
        if "shim" in process.argv and container in process.argv:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            sizes = {line.split()[0].rstrip(":"): line.split()[1] for line in text.splitlines()[1:]}
            return {name: int(sizes[key]) * 1024 / 1e6 for name, key in (("RSS", "Rss"), ("PSS", "Pss"))}
    raise RuntimeError(f"no process serves {container}")


def measure_cold(results: Results, machine: Sequence[str], kata: Containerd, runc: Containerd) -> None:
    bare = boot(machine)
    results.add("bare boot to the agent's first instruction", "s", bare.first_instruction)
    results.add("bare boot to agent ready", "s", bare.agent_ready)
    results.add("ctr run --rm, ours", "s", timed(lambda: succeed(kata)))
    results.add("ctr run --rm, runc", "s", timed(lambda: succeed(runc)))


def succeed(containerd: Containerd) -> None:
    result = containerd.run("true")
    if result.exit_status != 0:
        raise RuntimeError(f"{result}\n{containerd.log_since(0)}")


def measure_start(results: Results, shim: Path, kata: Containerd, container: str) -> None:
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
        ("cold ctr run / bare boot to agent ready", "ctr run --rm, ours", "bare boot to agent ready"),
        ("stdout / raw virtio-serial", "stdout, ours", "raw virtio-serial"),
    ]
    for name, above, below in ratios:
        results.add(name, "", results.median(above) / results.median(below))


def report(results: Results) -> None:
    targets = {target.name: target for target in TARGETS}
    for name in results.samples:
        value = results.median(name)
        line = f"{name:46} {value:9.2f} {results.units[name]:6}"
        if target := targets.get(name):
            line += f" {target.text}: {'met' if target.is_met(value) else 'MISSED'}"
        print(line.rstrip())


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
        },
    }


if __name__ == "__main__":
    sys.exit(main())
