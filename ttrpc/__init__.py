"""ttrpc: small remote procedure calls over any byte stream.

- `connection`, `frames`, `events`, `methods`, `status`: the protocol, without I/O
- `client`, `server`: the protocol on trio streams

This file stays empty, so that a program which brings its own I/O imports neither trio nor anything else
that it does not use.
"""
