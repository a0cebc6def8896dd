"""The kernels compiled for GPUs that need not be there: registers, stack, shared memory and machine instructions.

`launches_of` runs the operators on tensors without memory and notes what they would launch; `compile_launch` compiles
one such launch, in the way that triton's own launcher does, and reads what the assembler made of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from defense.core.ops.fused import launching

KIB = 1024


class Limits(NamedTuple):
    """What a multiprocessor of an architecture has; from the compute capabilities table of NVIDIA's CUDA guide."""

    shared_per_program: int
    """Bytes that one program may have."""
    shared_per_sm: int
    """Bytes that all of its programs have together, each with 1 KiB that the system keeps."""
    threads_per_sm: int


LIMITS = {
    80: Limits(163 * KIB, 164 * KIB, 2048),
    86: Limits(99 * KIB, 100 * KIB, 1536),
    89: Limits(99 * KIB, 100 * KIB, 1536),
    90: Limits(227 * KIB, 228 * KIB, 2048),
    100: Limits(227 * KIB, 228 * KIB, 2048),
    120: Limits(99 * KIB, 100 * KIB, 1536),
}
"""By compute capability, times ten."""
REGISTERS_PER_SM = 65_536
_TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|OMMA|QMMA)\b")
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Launch(NamedTuple):
    """What would have been launched."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture, shape, dtype and norm.

    Attributes:
        kernel: Its name.
        registers: Of a thread.
        stack_bytes: Of a thread: registers that were spilled.
        shared_bytes: Of a program.
        n_warps: Of a program.
        programs_per_sm: How many fit on a multiprocessor at once.
        n_instructions: Of the whole kernel.
        n_tensor_core: Instructions of the tensor cores among them.
        per_step: Instructions of the loop along d_model, of all loops the innermost that holds the product; None for
            kernels other than `_count_kernel` and `_encode_kernel`, and where the loop was unrolled away.
        per_slot: Instructions of the innermost loop that adds to the counts; None but for `_count_kernel`.
        sass: The machine code as text.
    """

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    n_warps: int
    programs_per_sm: int
    n_instructions: int
    n_tensor_core: int
    per_step: int | None
    per_slot: int | None
    sass: str


@contextmanager
def noted(capability: int) -> Iterator[list[Launch]]:
    """Return the list of what is launched inside, for an architecture; nothing runs."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, arguments, constants))

    with (
        mock.patch.object(launching, "launch", note),
        mock.patch.object(launching, "capability", return_value=divmod(capability, 10)),
    ):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile what `noted` noted.

    Raises:
        subprocess.CalledProcessError: The assembler's tools, which come with triton, do not take the result.
    """
    constants = dict(launch.constants)
    options: dict[str, Any] = {
        name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants
    }
    values = dict[str, Any](zip(launch.kernel.arg_names, launch.arguments, strict=False))
    source = _source(launch.kernel, values | constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    usage, sass = _dumped(compiled.asm["cubin"])
    registers, stack_bytes = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    n_warps, shared = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    code = _instructions(sass)
    is_tensor_core = [_TENSOR_CORE.search(text) is not None for _, text in code]
    product = is_tensor_core if any(is_tensor_core) else ["FFMA" in text for _, text in code]
    is_streaming = launch.name in ("_count_kernel", "_encode_kernel")
    counts = [launch.name == "_count_kernel" and re.search(r"\bREDG?\b", text) is not None for _, text in code]
    return Compiled(
        launch.name, registers, stack_bytes, shared, n_warps,
        _programs_per_sm(LIMITS[capability], registers, n_warps, shared),
        len(code), sum(is_tensor_core), _innermost(code, product) if is_streaming else None,
        _innermost(code, counts), sass,
    )  # fmt: skip


def _source(kernel: Any, values: dict[str, Any]) -> ASTSource:
    """Return a kernel with the types, constants and divisibilities that the launcher would find in its arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        is_specialized = not (parameter.is_constexpr or parameter.do_not_specialize)
        if parameter.is_constexpr or value is None or (is_specialized and isinstance(value, int) and value == 1):
            signature[name], constexprs[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        signature[name] = _TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or (is_specialized and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def _dumped(cubin: bytes) -> tuple[str, str]:
    """Return the resources and the machine code of a compiled kernel, as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [tool, option, file], capture_output=True, text=True, check=True,
                env={**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"},
            ).stdout
            for option in ("-res-usage", "-sass")
        )  # fmt: skip
    return usage, sass


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in: {text}"
    return match[1]


def _instructions(sass: str) -> list[tuple[int, str]]:
    """Return (address, text) of each instruction, without the padding after the last branch."""
    code = [(int(address, 16), text.strip()) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    while code and code[-1][1].startswith(("NOP", "BRA")):
        code.pop()
    return code


def _innermost(code: list[tuple[int, str]], is_marked: list[bool]) -> int | None:
    """Return the length of the shortest loop that holds a marked instruction."""
    loops = []
    place = {address: index for index, (address, _) in enumerate(code)}
    for end, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < address and int(target[1], 16) in place:
            loops.append((place[int(target[1], 16)], end))
    holding = [(start, end) for start, end in loops if any(is_marked[start : end + 1])]
    return min((end - start + 1 for start, end in holding), default=None)


def _programs_per_sm(limits: Limits, registers: int, n_warps: int, shared: int) -> int:
    """Return how many programs fit at once; a warp takes its registers in steps of 256."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS_PER_SM // (of_warp * n_warps),
        limits.shared_per_sm // (shared + KIB),
        limits.threads_per_sm // (32 * n_warps),
    )
