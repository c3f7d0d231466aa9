"""The program in the guest. It shares only schemas and protocols with the host."""
