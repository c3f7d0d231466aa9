"""Network of a pod: what its namespace holds and how the VM gets it."""
