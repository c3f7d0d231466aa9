"""What the CRI plugin's configuration of a pod says about the VM.

For a pod whose first container makes the sandbox, the same is in that container's config.json. Pure. A client
that sends another kind of configuration, or none, has said nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from protos.containerd import cri_sandbox_pb2 as cri
from vc.errors import InvalidArgument
from vc.resources import Size, cpu_limit, memory_limit

OURS = cri.PodSandboxConfig.DESCRIPTOR.full_name


@dataclass(frozen=True, slots=True)
class PodConfig:
    """A pod's name, its lines of resolv.conf, and what its containers need together."""

    hostname: str = ""
    dns: tuple[str, ...] = ()
    workload: Size = field(default_factory=Size)


def read(given: Any) -> PodConfig:
    """Return what a client's options say. Raises: InvalidArgument, if they are no pod's and claim to be."""
    if given.type_url.rpartition("/")[2] != OURS:
        return PodConfig()
    try:
        found = cri.PodSandboxConfig.FromString(given.value)
    except DecodeError as exc:
        raise InvalidArgument(f"the pod's configuration cannot be read as {given.type_url}: {exc}") from exc
    needs = found.linux.resources
    return PodConfig(
        hostname=found.hostname,
        dns=tuple(_resolv_conf(found.dns_config)),
        workload=Size(
            cpu_limit(needs.cpu_quota, needs.cpu_period, needs.cpu_shares),
            memory_limit(needs.memory_limit_in_bytes),
        ),
    )


def _resolv_conf(dns: cri.DNSConfig) -> list[str]:
    """Return the lines that resolv.conf(5) has for this."""
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return lines
