"""The OCI runtime specification: read config.json, plan its mounts, translate it for the guest. All pure."""
