"""Files for the guest: host mounts, the shared directory, and who exports it."""
