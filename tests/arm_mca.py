"""Predicts the speed of the inner loops of the modules for ARM, with llvm-mca: `make arm-mca`.

Run as `python tests/arm_mca.py FOLDER`: takes the loops out of the modules in FOLDER and prints, as a
Markdown table, how many products or floats a core computes in a cycle. It is a prediction: it takes every
load to hit the first cache, and leaves prefetches and branches out. It serves to compare two builds.
"""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

# Newest first: the models of Neoverse are not in the oldest ones.
VERSIONS = ("-21", "-20", "-19", "-18", "-17", "")
MCA = os.environ.get("LLVM_MCA") or next(filter(None, (shutil.which(f"llvm-mca{v}") for v in VERSIONS)), "")
CORES = ("cortex-a55", "cortex-a72", "neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2")
# What the vector pipes of each core could do if they did nothing else. 16 products of the baseline are four
# instructions.
PEAKS = {
    "baseline": (4, 8, 8, 8, 16, 16),
    "dotprod": (16, None, 32, 32, 64, 64),
    "i8mm": (None, None, None, 64, 128, 128),
}
PRODUCTS = {"sdot": 16, "smmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8}
PACKED = "microkernel|gemm_panels|dq_tiles"
GROUPS = "gemm_group_panel|dq_group_rows"
# Label, module, functions, products and vectors loaded in a turn, part of the products that are of use.
LOOPS = [
    ("W8A8, 4 rows", "baseline", PACKED, 256, 4, 1),
    ("W8A8, 1 row", "baseline", PACKED, 256, 16, 1),
    ("W4A8, 4 rows", "baseline", GROUPS, 512, 4, 1),
    ("W4A8, 1 row", "baseline", GROUPS, 512, 16, 1),
    ("`w8a8_matvec`", "baseline", "matvec", 128, 10, 1),
    ("W8A8, 4 rows", "dotprod", PACKED, 1024, 20, 1),
    ("W8A8, 1 row", "dotprod", PACKED, 256, 16, 1),
    ("W4A8, 4 rows", "dotprod", GROUPS, 1024, 12, 1),
    ("W4A8, 1 row", "dotprod", GROUPS, 512, 18, 1),
    ("`w8a8_matvec`", "dotprod", "matvec", 128, 10, 1),
    ("W8A8, 4 rows", "i8mm", PACKED, 1024, 20, 1),
    ("W8A8, 1 row", "i8mm", PACKED, 512, 18, 0.5),
]


@functools.cache
def functions(module):
    """Name and instructions of each function; an instruction is (address, text)."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", module]
    code = {}
    for line in subprocess.check_output(command, text=True).splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:", line):
            name = start[1]
        elif instruction := re.match(r" *([0-9a-f]+):\t([^/]*)", line):
            code.setdefault(name, []).append((int(instruction[1], 16), instruction[2].strip()))
    return code


def target(text):
    """Where an instruction branches to, and whether it may go on instead."""
    branch = re.match(r"(b|b\.\w+|cbn?z|tbn?z)\t.*?([0-9a-f]+) <", text)
    return (int(branch[2], 16), branch[1] != "b") if branch else (None, True)


def innermost_loops(code):
    """Instructions of each stretch of code that ends in a branch to its start and has none such within."""
    index = {address: i for i, (address, _) in enumerate(code)}
    ends = [(index.get(target(text)[0], i + 1), i) for i, (_, text) in enumerate(code)]
    ends = [(start, end) for start, end in ends if start <= end]
    for start, end in ends:
        if not any(start <= s and e <= end for s, e in ends if (s, e) != (start, end)):
            yield [text for _, text in code[start : end + 1]]


def cycles_through(code, start):
    """Every way from the instruction `start` back to it, as instructions, no branch taken twice."""
    index = {address: i for i, (address, _) in enumerate(code)}
    ways = [(start, [])]
    while ways:
        i, way = ways.pop()
        while i < len(code) and len(way) < 150:
            address, goes_on = target(code[i][1])
            way.append(code[i][1])
            if address is not None and index.get(address) == start:
                yield list(way)
                if not goes_on:
                    break
                i += 1
                continue
            if address in index and index[address] > start:
                if not goes_on:
                    i = index[address]
                    continue
                ways.append((index[address], list(way)))
            if not goes_on or code[i][1].startswith("ret"):
                break
            i += 1


def loads(body):
    """Vectors of 16 bytes that are loaded."""
    found = [text for text in body if re.match(r"ld(r|p|ur)\tq(?!.*\[sp)", text)]
    return sum(2 if text.startswith("ldp") else 1 for text in found)


def products(body):
    return sum(PRODUCTS.get(text.split("\t")[0], 0) for text in body)


def product_loop(module, names, count, vectors):
    """The shortest loop with so many products and loads."""
    found = [
        body
        for name, code in functions(module).items()
        if re.search(names, name)
        for body in innermost_loops(code)
        if products(body) == count and loads(body) == vectors
    ]
    if not found:
        raise SystemExit(f"{module.name}: no loop of {count} products and {vectors} loads in {names}")
    return min(found, key=len)


def quantize_loop(module):
    """One step of 32 floats whose codes are in range: without a division, and without clamping."""
    found = []
    for name, code in functions(module).items():
        if "quantize_steps" in name or "quantize_row_f32_s8" in name:
            heads = {to for address, text in code if (to := target(text)[0] or address) < address}
            for i, (address, _) in enumerate(code):
                if address in heads:
                    found += [way for way in cycles_through(code, i) if is_step_in_range(way)]
    if not found:
        raise SystemExit(f"{module.name}: no loop that quantizes")
    return min(found, key=len)


def is_step_in_range(way):
    text = "\n".join(way)
    return loads(way) == 8 and text.count("fmla") == 16 and not re.search("fdiv|sqxtn|prf|adrp", text)


def cycles(body, core):
    """Cycles of one turn, on average."""
    kept = [re.sub("<.*", "", text) for text in body if not re.match(r"prf|b\b|b\.|cb|tb", text)]
    options = ["-mtriple=aarch64", f"-mcpu={core}", "-mattr=+dotprod,+i8mm", "-iterations=200"]
    done = subprocess.run([MCA, *options], input="\n".join(kept), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{MCA}: {done.stderr}")
    return int(re.search(r"Total Cycles: +(\d+)", done.stdout)[1]) / 200


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def main():
    if not MCA:
        raise SystemExit("llvm-mca is missing: `apt install llvm-19`, or name it in the variable LLVM_MCA")
    folder = pathlib.Path(sys.argv[1])
    modules = {isa: next(folder.glob(f"_isa_{isa}.*.so")) for isa in PEAKS}
    line("loop", "instruction set", *(core.replace("-", " ").title() for core in CORES))
    line(*["---"] * 2, *["---:"] * len(CORES))
    body = quantize_loop(modules["baseline"])
    line("quantize, floats", "all", *(f"{32 / cycles(body, core):.2f}" for core in CORES))
    for isa, peaks in PEAKS.items():
        line("peak of products", isa, *(peak or "" for peak in peaks))
        for label, _, names, count, vectors, part in (loop for loop in LOOPS if loop[1] == isa):
            body = product_loop(modules[isa], names, count, vectors)
            has_it = zip(CORES, peaks, strict=True)
            figures = [f"{count * part / cycles(body, core):.1f}" if peak else "" for core, peak in has_it]
            line(label, isa, *figures)


if __name__ == "__main__":
    main()
