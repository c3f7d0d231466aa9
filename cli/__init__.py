"""Operator commands: an application beside the shim, over the library."""
