"""virtcontainers: sandboxes, containers, hypervisors, agents and devices of a VM-based runtime."""
