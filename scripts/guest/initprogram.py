"""The initrd's /init: an x86-64 program of system calls and nothing else, written without a compiler.

A shell as init costs a fork, an exec and a dynamic search for every line; what has to happen here is a dozen
system calls with constant arguments. So init is data: a list of `Call`s. Each becomes "load the registers,
syscall, check"; there are no loops, no memory writes and no libraries. An ELF header, one segment, the code
and its strings follow.

Convention (System V ABI, AMD64 supplement, "Linux kernel conventions"): number in rax, arguments in rdi,
rsi, rdx, r10, r8, r9, result in rax, an error is -errno. rbx keeps the last saved result, for "open, then
use the descriptor".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# arch/x86/entry/syscalls/syscall_64.tbl
SYS_WRITE, SYS_OPEN, SYS_CLOSE, SYS_DUP2, SYS_EXECVE = 1, 2, 3, 33, 59
SYS_CHDIR, SYS_UNLINK, SYS_CHROOT, SYS_MOUNT, SYS_EXIT_GROUP = 80, 87, 161, 165, 231
SYS_FINIT_MODULE, SYS_CLOSE_RANGE = 313, 436

BASE = 0x400000  # where the one segment is loaded
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr: gABI, "ELF Header"
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr: gABI, "Program Header"
CODE_AT = ELF_HEADER.size + PROGRAM_HEADER.size

# mov r32, imm32 (zero-extends to 64 bits): Intel SDM vol. 2, MOV, opcode B8+rd
LOAD = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8", b"\x41\xb9")  # edi esi edx r10d r8d r9d
LOAD_EAX = b"\xb8"
MOVE_RBX = {0: b"\x48\x89\xdf", 1: b"\x48\x89\xde"}  # mov rdi, rbx; mov rsi, rbx
SAVE_RESULT = b"\x48\x89\xc3"  # mov rbx, rax
SYSCALL = b"\x0f\x05"
TEST_RESULT = b"\x48\x85\xc0"  # test rax, rax
SKIP_IF_POSITIVE = b"\x79"  # jns rel8
JUMP = b"\xe9"  # jmp rel32
LOAD_ARGV = b"\x48\x8d\x74\x24\x08"  # lea rsi, [rsp+8]: process entry, System V ABI "Initial Stack"
LOAD_ENVP = b"\x48\x8b\x14\x24\x48\x8d\x54\xd4\x10"  # mov rdx, [rsp]; lea rdx, [rsp+rdx*8+16]


class Operand(Enum):
    """Arguments that are known only when init runs."""

    SAVED = "the result of the last call with save=True"
    ARGV = "init's own arguments"
    ENVP = "init's own environment: what the kernel makes of key=value on its command line"


Argument = int | str | Operand


@dataclass(frozen=True, slots=True)
class Call:
    """One system call. With `failure` set, an error ends the boot with that text; else errors are ignored."""

    number: int
    arguments: tuple[Argument, ...]
    failure: str = ""
    save: bool = False


def assemble(calls: Sequence[Call], log: str = "/dev/kmsg") -> bytes:
    """Return an ELF program that makes the calls in order and then exits with status 1.

    The text of a failure goes to the file `log`, which must exist.
    """
    strings = _Strings()
    # Two passes: code has the same length whatever the addresses are, so the first pass tells where strings
    # begin.
    length = len(_code(calls, strings, 0, log))
    strings_at = BASE + CODE_AT + length
    code = _code(calls, strings, strings_at, log)
    assert len(code) == length
    body = code + strings.data
    total = CODE_AT + len(body)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)  # 64-bit, little-endian, version 1
    header = ELF_HEADER.pack(
        ident,
        2,
        62,
        1,
        BASE + CODE_AT,
        ELF_HEADER.size,
        0,
        0,
        ELF_HEADER.size,
        PROGRAM_HEADER.size,
        1,
        0,
        0,
        0,
    )  # ET_EXEC, EM_X86_64
    segment = PROGRAM_HEADER.pack(
        1, 5, 0, BASE, BASE, total, total, 0x1000
    )  # PT_LOAD, readable and executable
    return header + segment + body


class _Strings:
    """NUL-terminated strings behind the code, each once."""

    def __init__(self) -> None:
        self.data = b""
        self._offsets: dict[str, int] = {}

    def offset(self, text: str) -> int:
        if text not in self._offsets:
            self._offsets[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self._offsets[text]


def _code(calls: Sequence[Call], strings: _Strings, strings_at: int, log: str) -> bytes:
    """Machine code of the calls, then exit, then what happens on failure."""
    out = bytearray()
    jumps: list[int] = []
    for call in calls:
        out += _one(call, strings, strings_at)
        if call.save:
            out += SAVE_RESULT
        if call.failure:
            text = f"init: {call.failure}\n"
            report = LOAD[1] + struct.pack("<I", strings_at + strings.offset(text))
            report += LOAD[2] + struct.pack("<I", len(text.encode())) + JUMP + bytes(4)
            out += TEST_RESULT + SKIP_IF_POSITIVE + bytes([len(report)]) + report
            jumps.append(len(out))
    out += LOAD[0] + struct.pack("<I", 1) + LOAD_EAX + struct.pack("<I", SYS_EXIT_GROUP) + SYSCALL
    for end in jumps:
        out[end - 4 : end] = struct.pack("<i", len(out) - end)
    return bytes(out + _failure(strings, strings_at, log))


def _failure(strings: _Strings, strings_at: int, log: str) -> bytes:
    """With -errno in rax and the text in rsi and rdx: log it, exit with errno (which makes a panic)."""
    out = b"\x49\x89\xc4\x49\x89\xf5\x49\x89\xd6"  # mov r12, rax; mov r13, rsi; mov r14, rdx
    out += _one(Call(SYS_OPEN, (log, 1)), strings, strings_at)
    out += b"\x48\x89\xc7\x4c\x89\xee\x4c\x89\xf2"  # mov rdi, rax; mov rsi, r13; mov rdx, r14
    out += LOAD_EAX + struct.pack("<I", SYS_WRITE) + SYSCALL
    out += b"\x4c\x89\xe7\x48\xf7\xdf"  # mov rdi, r12; neg rdi
    return out + LOAD_EAX + struct.pack("<I", SYS_EXIT_GROUP) + SYSCALL


def _one(call: Call, strings: _Strings, strings_at: int) -> bytes:
    out = b""
    for index, argument in enumerate(call.arguments):
        match argument:
            case Operand.SAVED:
                out += MOVE_RBX[index]
            case Operand.ARGV:
                assert index == 1
                out += LOAD_ARGV
            case Operand.ENVP:
                assert index == 2
                out += LOAD_ENVP
            case str():
                out += LOAD[index] + struct.pack("<I", strings_at + strings.offset(argument))
            case int():
                out += LOAD[index] + struct.pack("<I", argument)
    return out + LOAD_EAX + struct.pack("<I", call.number) + SYSCALL
