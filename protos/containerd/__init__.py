"""The services and messages between containerd and a shim."""
