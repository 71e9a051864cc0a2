"""The kernels of the table: how each is found, cuts its work, and what it is predicted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.cost.sizes import HEADS, TOKENS, Size, attention_size, row_size, window_size

HEAD_DIMS = (32, 64, 128)
WIDTHS = (384, 768, 1024)


@dataclass(frozen=True)
class Cut:
    """How a block cuts the work.

    Attributes:
        rows: rows of the result that one pass around the loop makes.
        keys: keys that a step of the loop takes.
        steps: how many steps there are to such a pass, where that does not depend on the keys.
        peeled: steps that the code around the loop makes.
        warps: of a block, where fewer run than it was compiled for.
        text: in words.
    """

    rows: float
    keys: int = 0
    steps: int = 0
    peeled: int = 0
    warps: int = 0
    text: str = ""

    def passes(self, size: Size) -> tuple[float, float]:
        """Passes around the loop, and steps through it, of all blocks together."""
        around = size.rows / self.rows
        if self.keys:
            return around, around * max(0.0, size.keys / self.keys - self.peeled)
        return around, around * self.steps


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        pattern: a regular expression for the kernel's name.
        cut: how it cuts its work, from a Triton kernel's constants or the numbers in the traits of
            one in CUDA C++.
        launch: a function of bench/cost/launches.py with its arguments; none for CUDA C++.
        guarded: a test compares its counts with the recorded ones.
    """

    name: str
    pattern: str
    sizes: tuple[Size, ...]
    cut: Callable[[Any], Cut]
    launch: tuple[str, dict[str, Any]] | None = None
    guarded: bool = False
    archs: tuple[int, ...] = field(default=(80, 90, 100))

    @property
    def backend(self) -> str:
        return "triton" if self.launch else "cuda"

    @property
    def key(self) -> str:
        return f"{self.backend} {self.name}"


def traits_of(name: str) -> list[int]:
    """The numbers among the arguments of a CUDA kernel's traits."""
    found = re.search(r"<\w+<([^<>]*)>", name)
    return [int(n) for n in re.findall(r"\b\d+\b", found[1])] if found else []


def _key_loop(peeled: int) -> Callable[[dict[str, Any]], Cut]:
    def cut(c: dict[str, Any]) -> Cut:
        keys = c.get("BLOCK_N") or c["CHUNK"]
        return Cut(c["BLOCK_M"], keys, peeled=peeled, text=f"{c['BLOCK_M']}x{keys}")

    return cut


def _one_tile(c: dict[str, Any]) -> Cut:
    packed = " packed" * bool(c.get("PACK_ROWS"))
    return Cut(c["BLOCK_M"], text=f"{c['BLOCK_M']}x{c['BLOCK_N']}{packed}")


def _rows(c: dict[str, Any]) -> Cut:
    return Cut(c["BLOCK_M"], text=f"{c['BLOCK_M']} rows")


def triton_cases() -> Iterator[Case]:
    for d in HEAD_DIMS:
        for length, guarded in ((32, False), (64, False), (128, d == 64)):
            yield Case(
                f"attention D={d}, up to {length} keys",
                "^attention_kernel",
                (attention_size(d, length),),
                _one_tile,
                ("plain", {"head_dim": d, "lengths": [length]}),
                guarded,
            )
        yield Case(
            f"attention D={d}, uneven lengths",
            "^attention_kernel",
            (),
            _key_loop(1),
            ("uneven", {"head_dim": d}),
        )
        lengths = (256, 512)
        yield Case(
            f"attention D={d}, a loop",
            "^attention_kernel",
            tuple(attention_size(d, n) for n in lengths),
            _key_loop(1),
            ("plain", {"head_dim": d, "lengths": lengths}),
            guarded=True,
        )
    yield Case(
        "attention with a bias D=64, a loop",
        "^attention_kernel",
        (attention_size(64, 512),),
        _key_loop(1),
        ("biased", {"head_dim": 64, "length": 512}),
    )
    yield Case(
        "local attention D=64",
        "local_attention",
        (window_size(64, 512),),
        _key_loop(1),
        ("local", {"head_dim": 64, "length": 512}),
        guarded=True,
    )
    yield Case(
        "disentangled attention D=64, a loop",
        "disentangled",
        (attention_size(64, 512, products=4),),
        _key_loop(0),
        ("disentangled", {"head_dim": 64, "length": 512}),
        guarded=True,
    )
    for width in WIDTHS:
        at_base, arguments = width == 768, {"width": width}
        yield Case(
            f"add and norm N={width}",
            "add_layer_norm",
            (row_size(width, 3),),
            _rows,
            ("norm_of_sum", arguments),
            at_base,
        )
        yield Case(
            f"embeddings and norm N={width}",
            "embed_layer_norm",
            (row_size(width, 2),),
            _rows,
            ("norm_of_embeddings", arguments),
            at_base,
        )
    yield Case(
        "gated GELU N=1152",
        "gated",
        (row_size(1152, 3),),
        lambda c: Cut(c["BLOCK_M"] * c["BLOCK_N"] / 1152, text=f"{c['BLOCK_M']}x{c['BLOCK_N']}"),
        ("gate", {"width": 1152}),
    )
    yield Case(
        "rotary D=64",
        "rotary",
        (row_size(64 * HEADS, 4, rows=2 * TOKENS * HEADS),),
        _rows,
        ("rotate", {"head_dim": 64}),
    )


def _cuda_loop(name: str) -> Cut:
    _, keys, warps, row_tiles, *_ = traits_of(name)
    rows = warps * row_tiles * 16
    return Cut(rows, keys, text=f"{rows}x{keys}")


def _cuda_one_tile(name: str) -> Cut:
    _, keys, rows, warps, items, _ = traits_of(name)
    side_by_side = f", {items} at a time" * (items > 1)
    return Cut(rows * items, steps=rows // (16 * warps), text=f"{rows}x{keys}{side_by_side}")


def _cuda_disentangled(name: str) -> Cut:
    _, warps, _ = traits_of(name)
    return Cut(32 * warps, 32, text=f"{32 * warps}x32")


def _cuda_rows(name: str) -> Cut:
    _, threads, _ = traits_of(name)
    rows = max(1, 128 // threads)
    # The blocks of a full device walk over the rows; what they do once is spread over all.
    return Cut(TOKENS, steps=TOKENS // rows, text=f"{rows} rows")


def _cuda_gelu(width: int) -> Callable[[str], Cut]:
    def cut(name: str) -> Cut:
        (vector,) = traits_of(name)
        columns = -(-width // vector // 256)
        warps = -(-width // vector // columns // 32)
        return Cut(4 / columns, warps=warps, text="4 rows")

    return cut


def cuda_cases() -> Iterator[Case]:
    for d in HEAD_DIMS:
        in_one_tile = (32, 64, 128, 256) if d == 32 else (32, 64, 128)
        for length in in_one_tile:
            yield Case(
                f"attention D={d}, up to {length} keys",
                rf"one_tile_kernel<\w+<BFloat16, {d}, {length},",
                (attention_size(d, length),),
                _cuda_one_tile,
                guarded=(d, length) == (64, 128),
            )
        lengths = (512,) if d == 32 else (256, 512)
        yield Case(
            f"attention D={d}, a loop",
            rf"key_loop_kernel<\w+<BFloat16, {d},",
            tuple(attention_size(d, n) for n in lengths),
            _cuda_loop,
            guarded=True,
        )
    yield Case(
        "disentangled attention D=64, a loop",
        r"disentangled_kernel<\w+<BFloat16, 64, true, true, 4,",
        (attention_size(64, 512, products=4),),
        _cuda_disentangled,
        guarded=True,
    )
    for width, traits in zip(WIDTHS, ("8, 16, 3", "8, 32, 3", "8, 32, 4"), strict=True):
        for name, kernel, tensors in (
            ("add and norm", "add_layer_norm", 3),
            ("embeddings and norm", "embed_layer_norm", 2),
        ):
            yield Case(
                f"{name} N={width}",
                rf" {kernel}_kernel<\w+<BFloat16, {traits}>",
                (row_size(width, tensors),),
                _cuda_rows,
                guarded=width == 768,
            )
    yield Case(
        "bias and GELU N=3072",
        r"bias_gelu_kernel<\w+<BFloat16, 8>",
        (row_size(3072, 2),),
        _cuda_gelu(3072),
        guarded=True,
    )
