"""Each function of csrc/ptx.cuh as the device runs it against its twin in the emulation.

Kernels are tested with the host bodies of these functions. That the device bodies do the same is
tested here: tests/cuda_host/wrappers.cu calls every function once, nvcc makes PTX of it, and an
interpreter of PTX runs that. An operand in the wrong place gives other words, or an error.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType

import cuda_host_build
import numpy as np
import pytest
from ptx_interpreter import IN, OUT, Block, Kernel, PtxError, parse

reason = cuda_host_build.why_not()
if shutil.which("nvcc") is None:
    reason = "nvcc is not installed"
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

ROOT = Path(__file__).resolve().parents[1]
HEADER = (ROOT / "csrc/ptx.cuh").read_text()
SOURCE = cuda_host_build.EMULATION / "wrappers.cu"
CASES = re.findall(r"^CASE\((\w+)\)", SOURCE.read_text(), re.MULTILINE)
THREADS = 64


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    ptx = tmp_path_factory.mktemp("ptx") / "wrappers.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-arch=compute_80", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run([*command, str(SOURCE), "-o", str(ptx)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return parse(ptx.read_text())


@pytest.fixture(scope="module")
def emulation() -> ModuleType:
    return cuda_host_build.build_probe()


def floats(*values: float) -> np.ndarray:
    """For the first input of each thread, again and again."""
    words = np.zeros((THREADS, 16), np.float32)
    words[:, 0] = np.resize(np.array(values, np.float32), THREADS)
    return words.view(np.uint32)


def small_integers(dtype: str) -> np.ndarray:
    """Pairs in half precision: sums of their products are exact."""
    random = np.random.default_rng(0)
    values = random.integers(-8, 9, (THREADS, 32)).astype(np.float32)
    bits = values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits.view(np.uint32)


POWERS = [2.0**i for i in (*range(-149, 126, 6), -127, -126, 126, 127)]
# Random bits, but where results must be exact or numbers are meant. All are powers of two or have
# a whole exponent: elsewhere the hardware may be off by a unit in the last place.
INPUTS = {
    "exp2_approx": floats(*range(-160, 130, 5), 1e-40, -1e-40, np.inf, -np.inf, 200.0),
    "reciprocal_approx": floats(*POWERS, *(-x for x in POWERS[::8]), np.inf, -np.inf),
    "reciprocal_sqrt": floats(*(4.0**i for i in range(-60, 60, 2)), np.inf),
    "mma_m16n8k16__half": small_integers("float16"),
    "mma_m16n8k16__bfloat16": small_integers("bfloat16"),
}
# Numbers, of which NaN has many.
FLOATS = {"to_float__half", "unpack2__half"}


def words_for(case: str) -> np.ndarray:
    random = np.random.default_rng(sum(map(ord, case)))
    words = random.integers(0, 2**32, (THREADS, 16), dtype=np.uint32)
    return INPUTS.get(case, words)


def run_ptx(kernel: Kernel, words: np.ndarray, last_first: bool) -> tuple[np.ndarray, set[str]]:
    out = bytearray(4 * 8 * THREADS)
    block = Block(kernel, {IN: bytearray(words.tobytes()), OUT: out}, THREADS)
    block.run(last_first)
    return np.frombuffer(out, np.uint32), block.executed


# By which order the threads come, an access that does not wait for its barrier shows.
@pytest.mark.parametrize("last_first", (False, True), ids=("first-first", "last-first"))
@pytest.mark.parametrize("case", CASES)
def test_device_and_host_do_the_same(
    kernels: dict[str, Kernel], emulation: ModuleType, case: str, last_first: bool
) -> None:
    words = words_for(case)
    on_host = np.array(emulation.run_wrapper(case, words.ravel().tolist()), np.uint32)
    on_device, _ = run_ptx(kernels[case], words, last_first)
    assert on_host.any(), "the case says nothing"
    if case in FLOATS:
        np.testing.assert_array_equal(on_device.view(np.float32), on_host.view(np.float32))
    else:
        np.testing.assert_array_equal(on_device, on_host)


def executed(kernels: dict[str, Kernel], case: str) -> set[str]:
    """The instructions that a case comes to, as they are written."""
    return run_ptx(kernels[case], words_for(case), False)[1]


def test_every_function_has_its_cases() -> None:
    """As many as it has bodies: one for each type that it is written out for."""
    signature = re.compile(
        r"^EF_DEVICE [\w&*]+(?: \w+)? (\w+)(?:<[^>]*>)?\([^;{]*\) \{", re.MULTILINE
    )
    bodies = Counter(signature.findall(HEADER))
    # Every function was found: what is no body is a declaration that templates are written out for.
    declarations = re.findall(r"^EF_DEVICE [^{;]*;", HEADER, re.MULTILINE)
    assert bodies.total() + len(declarations) == len(
        re.findall(r"^EF_DEVICE", HEADER, re.MULTILINE)
    )
    cases = Counter(case.split("__")[0] for case in CASES)
    assert cases.keys() == bodies.keys()
    lacking = {name: n for name, n in bodies.items() if cases[name] < n}
    assert not lacking, f"bodies without a case in {SOURCE.name}: {lacking}"


def test_every_instruction_is_run(kernels: dict[str, Kernel]) -> None:
    """Each piece of inline PTX, such as that of each size of an access."""
    written = re.findall(r'asm(?: volatile)?\(\s*"([a-z][\w.]+)', HEADER)
    # One more is the empty one that only hides a number from the compiler.
    assert len(written) == len(re.findall(r"asm(?: volatile)?\(", HEADER)) - 1
    run = set().union(*(executed(kernels, case) for case in CASES))
    assert set(written) <= {text.split()[0] for text in run}


# Instructions whose result depends on their operands alone.
PURE = ("cvt", "ex2", "rcp", "mma")


def test_no_access_may_be_moved_across_what_orders_it() -> None:
    """Nor left out: the compiler knows of an asm that it touches memory, if it is told so."""
    statements = re.findall(r"asm( volatile)?\(\s*(.*?)\);", HEADER, re.DOTALL)
    assert len(statements) == len(re.findall(r"\basm\b", HEADER))
    for volatile, body in statements:
        opcode = body.lstrip('"').split(".")[0]
        if opcode not in PURE and not body.startswith('""'):
            assert volatile and '"memory"' in body, body


# What the words in memory cannot tell.
@pytest.mark.parametrize(
    ("case", "has", "lacks"),
    (
        ("load_global__uint32", r"ld\.global\.nc\.\w+32", ""),
        ("load_global__uint4", r"ld\.global\.nc\.v4\.\w+32", ""),
        ("load_global__half", r"ld\.global\.nc\.\w+16", ""),
        ("load_global_coherent", r"ld\.global\.v4\.\w+32", r"ld\.global\.nc.*"),
        ("store_global", r"st\.global\.v4\.\w+32", ""),
        ("atomic_add_global", r"(atom|red)\.global\.add\.\w+32", ""),
        ("fence_device", r"membar\.gl|fence\.(acq_rel|sc)\.gpu", ""),
        ("cp_async__16", r"cp\.async\.cg\.shared\.global", r"cp\.async\.ca\..*"),
        ("cp_async_wait", r"cp\.async\.wait_group 1", ""),
        ("named_barrier_arrive", r"bar\.arrive", ""),
        ("sync_warp", r"bar\.warp\.sync", r"bar\.sync"),
    ),
    ids=lambda value: value if value in CASES else "",
)
def test_instructions_are_those_meant(
    kernels: dict[str, Kernel], case: str, has: str, lacks: str
) -> None:
    run = executed(kernels, case)
    assert any(re.match(rf"({has})( |$)", text) for text in run)
    assert not lacks or not any(re.match(lacks, text) for text in run)


def run_lines(*lines: str) -> np.ndarray:
    """A kernel whose threads store %r9."""
    body = ["mov.u32 %r1, %tid.x", "mov.u32 %r9, 0", "ld.param.u64 %rd1, [p_param_0+8]", *lines]
    body += ["mul.wide.s32 %rd2, %r1, 32", "add.s64 %rd3, %rd1, %rd2", "st.global.u32 [%rd3], %r9"]
    text = ".entry probe( .param )\n{\n" + ";\n".join([*body, "ret"]) + ";\n}"
    return run_ptx(parse(text)["probe"], words_for("probe"), False)[0][::8]


def test_the_interpreter_itself() -> None:
    """Where its errors would not show as a difference."""
    assert run_lines("shfl.sync.up.b32 %r9|%p1, %r1, 2, 0, -1")[:4].tolist() == [0, 1, 0, 1]
    assert run_lines("vote.sync.ballot.b32 %r9, 1, -1").tolist() == [2**32 - 1] * THREADS
    high, low = (struct.unpack("I", struct.pack("f", x))[0] for x in (2.0, 1.0))
    packed = run_lines(
        f"mov.f32 %f1, 0f{high:08X}", f"mov.f32 %f2, 0f{low:08X}", "cvt.rn.f16x2.f32 %r9, %f1, %f2"
    )
    assert packed[0] == 0x40003C00
    for wrong, message in (
        (["bar.sync 64, 2"], "barriers are 0 to 15"),
        (["bar.sync 2, 128"], "wait for ever"),
        (["setp.lt.s32 %p1, %r1, 40", "@%p1 bar.sync 0"], "wait for ever"),
        (["bar.warp.sync 1"], "not among those"),
        (["ld.shared.v4.b32 {%r2, %r3, %r4, %r9}, [8]"], "not aligned"),
        (["ld.shared.b32 %r9, [1024]"], "nobody's"),
        (["fma.rn.f32 %r9, %f1, %f1, %f1"], "unknown instruction"),
    ):
        with pytest.raises(PtxError, match=message):
            run_lines(*wrong)
