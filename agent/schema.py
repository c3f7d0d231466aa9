"""The messages of the agent API: the only module of the agent that names the generated code.

The rest uses what is here by attributes, keywords, lists, dictionaries, SerializeToString and FromString
alone, so that another codec could take protobuf's place.
"""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty

from protos.kata import agent_pb2 as agent
from protos.kata import health_pb2 as health
from protos.kata import oci_pb2 as oci
from protos.kata import types_pb2 as types

__all__ = ["EMPTY", "Empty", "agent", "health", "oci", "types"]

EMPTY = Empty()
