"""Kata's CacheService over gRPC: how anybody asks the VM cache what it has, or ends it.

The service runs in grpc's own threads beside trio and reaches into trio for everything, so that there is one
owner of the pool. The rule: nothing else imports grpc, which costs 40 ms and 9.5 MB; the shim takes its VMs
by `vc.factory.handover` and never comes here.

Source: Kata's protocols/cache/cache.proto. A `GrpcVM` cannot hold a VM, so its `hypervisor` says where to
fetch it, and its name there is its `id`.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from protos.kata import cache_pb2
from vc.errors import VCError
from vc.factory.cacheserver import Pool
from vc.factory.handover import handover_path

SERVICE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"]
THREADS = 4
GRACE = 1.0  # seconds for calls that run when the server ends; Kata's Quit waits as long
CALL_TIMEOUT = 5.0  # seconds
PRIVATE = 0o177  # what the socket's mode is without

Answer = TypeVar("Answer", bound=Message)


class _Service:
    """The methods, called in grpc's threads."""

    def __init__(self, endpoint: Path, pool: Pool, key: str, on_quit: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._pool = pool
        self._key = key
        self._on_quit = on_quit
        self._token = trio.lowlevel.current_trio_token()

    def handler(self) -> Any:
        """Return what a grpc server serves."""
        methods = {
            method.name: grpc.unary_unary_rpc_method_handler(
                getattr(self, method.name),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in SERVICE.methods
        }
        return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)

    def Config(self, _request: Empty, _context: object) -> cache_pb2.GrpcVMConfig:
        return cache_pb2.GrpcVMConfig(Data=self._key.encode())

    def GetBaseVM(self, _request: Empty, context: Any) -> cache_pb2.GrpcVM:
        offer = trio.from_thread.run_sync(self._pool.promise, trio_token=self._token)
        if offer is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no VM is ready")
            raise AssertionError  # abort raises
        where = {"pid": offer.pid, "socket": str(handover_path(self._endpoint)), "key": self._key}
        config = self._pool.config
        return cache_pb2.GrpcVM(
            id=offer.vmid, hypervisor=json.dumps(where).encode(), cpu=config.vcpus, memory=config.memory_mib
        )

    def Status(self, _request: Empty, _context: object) -> cache_pb2.GrpcStatus:
        offers = trio.from_thread.run_sync(self._pool.offers, trio_token=self._token)
        config = self._pool.config
        vms = [
            cache_pb2.GrpcVMStatus(pid=offer.pid, cpu=config.vcpus, memory=config.memory_mib)
            for offer in offers
        ]
        return cache_pb2.GrpcStatus(pid=os.getpid(), vmstatus=vms)

    def Quit(self, _request: Empty, _context: object) -> Empty:
        trio.from_thread.run_sync(self._on_quit, trio_token=self._token)
        return Empty()


@asynccontextmanager
async def door(endpoint: Path, pool: Pool, key: str, *, on_quit: Callable[[], None]) -> AsyncIterator[None]:
    """Serve at `endpoint` as long as the block lasts. Raises: VCError."""
    server = grpc.server(ThreadPoolExecutor(THREADS, "cache"))
    server.add_generic_rpc_handlers((_Service(endpoint, pool, key, on_quit).handler(),))
    before = os.umask(PRIVATE)  # grpc makes the socket itself
    try:
        server.add_insecure_port(f"unix:{endpoint}")
    except RuntimeError as exc:
        raise VCError(f"cannot serve at {str(endpoint)!r}, the vm_cache_endpoint: {exc}") from exc
    finally:
        os.umask(before)
    server.start()
    try:
        yield
    finally:
        ended = server.stop(GRACE)
        with trio.CancelScope(shield=True):  # bounded by the wait itself
            await trio.to_thread.run_sync(ended.wait, 2 * GRACE)
        endpoint.unlink(missing_ok=True)


def ask(endpoint: Path, method: str, answer: type[Answer]) -> Answer:
    """Call a method of the cache at `endpoint`. Blocks. Raises: VCError."""
    with grpc.insecure_channel(f"unix:{endpoint}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=Empty.SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            reply: Answer = call(Empty(), timeout=CALL_TIMEOUT)
        except grpc.RpcError as exc:
            raise VCError(f"the VM cache at {str(endpoint)!r}: {exc.details()}") from exc
    return reply


def status_of(endpoint: Path) -> cache_pb2.GrpcStatus:
    """Ask the cache what it has. Raises: VCError."""
    return ask(endpoint, "Status", cache_pb2.GrpcStatus)


def quit_cache(endpoint: Path) -> None:
    """Tell the cache to end. Raises: VCError."""
    ask(endpoint, "Quit", Empty)
