"""Keeps the other libraries from AVX-512, as if on a processor without it: `--no-avx512`.

All but one can be told so. ONNX Runtime asks the processor, and by the instruction xgetbv whether the system
saves the registers. Where it is installed a copy is made in a temporary folder, in which each of these
instructions, found by disassembly, is one that answers that SSE and AVX registers alone are saved. What newer
processors have in AVX registers, VNNI among it, is asked for by cpuid with 7 and 1: the answer becomes 0.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# NumPy skips the names that its version does not know.
VARIABLES = {
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4",
    "OPENBLAS_CORETYPE": "Haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
NUMKONG_KEEPS = ("serial", "haswell", "alder", "sierra")

# `push 7; pop rax` leaves the bits for x87, SSE and AVX where xgetbv leaves those of all that is saved.
XGETBV, PUSH_7_POP_RAX = b"\x0f\x01\xd0", b"\x6a\x07\x58"
CPUID, XOR_EAX_EAX = b"\x0f\xa2", b"\x31\xc0"
LEAF_7_1 = ("mov $0x7,%eax", "mov $0x1,%ecx")

# Removed when Python ends.
_folder: Any = None


def apply(with_peers: bool) -> None:
    """To be called before any of the libraries is imported."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        sys.exit(f"--no-avx512 needs Linux on x86-64, got {sys.platform} on {platform.machine()}")
    os.environ.update(VARIABLES)
    spec = importlib.util.find_spec("onnxruntime") if with_peers else None
    if spec is not None and spec.origin is not None:
        sys.path.insert(0, _patched_copy(Path(spec.origin).parent))


def _patched_copy(package: Path) -> str:
    global _folder
    if shutil.which("objdump") is None:
        sys.exit("--no-avx512 needs objdump to change ONNX Runtime; it comes with binutils")
    print("looking for xgetbv in ONNX Runtime ...", file=sys.stderr, flush=True)
    _folder = tempfile.TemporaryDirectory(prefix="dynquant-bench-")
    copy = Path(_folder.name, package.name)
    shutil.copytree(package, copy)
    if not sum(_patch(library) for library in copy.rglob("*.so*")):
        sys.exit(f"--no-avx512 found no xgetbv in {package}, and cannot keep it from AVX-512")
    return _folder.name


def _patch(library: Path) -> int:
    """Replaces the instructions in the code of `library`; returns how many xgetbv there were."""
    code = bytearray(library.read_bytes())
    if XGETBV not in code:
        return 0
    start, offset = _text_section(library)
    found = 0
    for address, old, new in _to_replace(library):
        place = address - start + offset
        if code[place : place + len(old)] != old:
            sys.exit(f"--no-avx512 found other code in {library.name} than objdump")
        code[place : place + len(new)] = new
        found += old == XGETBV
    library.write_bytes(code)
    return found


def _to_replace(library: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """Address, bytes and new bytes of each instruction that asks."""
    before = ["", ""]
    for line in _objdump("--disassemble", "--no-show-raw-insn", "--section=.text", library):
        address, _, instruction = (" ".join(part.split()) for part in line.partition(":"))
        if instruction == "xgetbv":
            yield int(address, 16), XGETBV, PUSH_7_POP_RAX
        elif instruction == "cpuid" and sorted(before) == sorted(LEAF_7_1):
            yield int(address, 16), CPUID, XOR_EAX_EAX
        before = [before[1], instruction]


def _text_section(library: Path) -> tuple[int, int]:
    """Its address, and its place in the file."""
    headers = _objdump("--section-headers", library)
    fields = next(line.split() for line in headers if " .text " in line)
    return int(fields[3], 16), int(fields[5], 16)


def _objdump(*arguments: str | Path) -> Iterator[str]:
    """The lines printed, which would be hundreds of megabytes together."""
    with subprocess.Popen(["objdump", *arguments], stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout or ()


def check(peers: Any) -> None:
    """Keeps NumKong from AVX-512 too, and ends the program where another library still has it.

    A sum of two products of bytes, up to 2 * 255 * 127, saturates in the instruction of AVX2 and not in VNNI.
    """
    if peers.numkong is not None:
        for name, present in peers.numkong.get_capabilities().items():
            if present and name not in NUMKONG_KEEPS:
                peers.numkong.disable_capability(name)
    if peers.torch is not None:
        if (capability := peers.torch.backends.cpu.get_cpu_capability()) != "AVX2":
            sys.exit(f"--no-avx512: PyTorch still computes with {capability}")
        for engine in ("x86", "fbgemm"):
            _must_saturate(f"PyTorch's engine {engine}", _torch_product(peers.torch, engine))
    if peers.onnxruntime is not None:
        _must_saturate("ONNX Runtime", _ort_product(peers))


def _must_saturate(name: str, product: float) -> None:
    if product == 64 * 255 * 127:
        sys.exit(f"--no-avx512: {name} still multiplies with VNNI")


def _torch_product(torch: Any, engine: str) -> float:
    """64 * 255 * 127 if it is exact; 1.0 has the code 255 at the scale 1 / 255."""
    torch.backends.quantized.engine = engine
    w, scales = torch.full((64, 64), 127, dtype=torch.int8), torch.ones(64, dtype=torch.float64)
    weight = torch._make_per_channel_quantized_tensor(w, scales, torch.zeros(64, dtype=torch.int64), 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return round(float(torch.ops.quantized.linear_dynamic(torch.ones(1, 64), packed, False)[0, 0]) * 255)


def _ort_product(peers: Any) -> float:
    np = peers.np
    a, w = np.full((1, 64), 255, np.uint8), np.full((64, 64), 127, np.int8)
    node = peers.onnx.helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    session = peers.ort_session([node], {"a": a}, {"y": np.empty((1, 64), np.int32)}, {"w": w})
    return session.run(None, {"a": a})[0][0, 0]
