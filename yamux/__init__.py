"""Many streams over one line: the yamux protocol, client and server.

Pure modules turn bytes into events and back (`frames window stream connection resync buffer turns`);
`session`, `trio_stream` and `serial` do I/O. Nothing is imported here, so that the guest's agent pays for
what it uses and never for trio.
"""
