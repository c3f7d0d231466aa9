"""Many streams over one line: the yamux protocol, client and server.

Pure modules turn bytes into events and back (`frames window stream connection resync buffer`); only `session`
does I/O. Nothing is imported here, so that the guest's agent pays for what it uses and never for trio.
"""
