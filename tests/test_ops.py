"""The public ops on every backend at hand: numbers, errors, torch.compile."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from berts import DEVICE, DTYPES
from kernel_backends import kernel_backends

from encoder_fast.backends import cpu_kernels, why_not
from encoder_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_sum
from encoder_fast.ops.attention import attention, why_no_head_size
from encoder_fast.ops.embed_layer_norm import embed_layer_norm
from encoder_fast.ops.linear import linear, prepare_feed_forward, run_feed_forward
from encoder_fast.ops.rotary import rotary, rotary_tables
from encoder_fast.parity import compare

BACKENDS = [
    *(name for name in ("reference", "cpu") if why_not(name, torch.device(DEVICE)) is None),
    *kernel_backends(),
]

# The CUDA kernels have neither windows nor biases nor rotary positions.
WITH_OPTIONS = [name for name in BACKENDS if "cuda" not in name]
# Nor has their attention float32.
WITH_DTYPES = [(name, dtype) for name in BACKENDS for dtype in DTYPES]
ATTENTION = [(n, d) for n, d in WITH_DTYPES if not (n.startswith("cuda") and d == "fp32")]


def head_size(backend: str) -> int:
    """The smallest of 16 and 32 that a backend runs."""
    return 16 if why_no_head_size(backend, 16) is None else 32


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def check(output: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    row = compare("op", output, eager, exact)
    assert row.ok, row


# Each length sits at or beside the edge of a tile or of a group of equal lengths.
LENGTHS = {
    "one": [1],
    "mixed": [15, 16, 17, 0, 63, 64, 65, 1],
    "equal-neighbours": [7, 7, 7, 3, 7, 7],
    "empty-rows": [0, 5, 0, 0],
    "long": [127, 129],
    "none": [],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_attention(backend: str, dtype: str, lengths: str) -> None:
    counts = LENGTHS[lengths]
    total, size = sum(counts), head_size(backend)
    qkv = torch.randn(total + 3, 3, 2, size, dtype=DTYPES[dtype], device=DEVICE)
    q, k, v = qkv.unbind(1)
    output = attention(q, k, v, cumulative(counts), max(counts, default=0), backend=backend)
    assert output.shape == q.shape
    assert output.is_contiguous()
    assert (output[total:] == 0).all()  # tokens of no sequence
    start = 0
    for count in counts:
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        one = [x[rows].transpose(0, 1) for x in (q, k, v)]
        eager = torch.softmax(one[0] @ one[1].transpose(1, 2) * size**-0.5, dim=-1) @ one[2]
        wide = [x.double() for x in one]
        exact = torch.softmax(wide[0] @ wide[1].transpose(1, 2) * size**-0.5, dim=-1) @ wide[2]
        check(output[rows], eager.transpose(0, 1), exact.transpose(0, 1))


@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_attention_scale(backend: str, dtype: str) -> None:
    q, k, v = torch.randn(3, 9, 2, head_size(backend), device=DEVICE).to(DTYPES[dtype])
    output = attention(q, k, v, cumulative([9]), 9, softmax_scale=0.7, backend=backend)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    eager = torch.softmax(heads[0] @ heads[1].transpose(1, 2) * 0.7, dim=-1) @ heads[2]
    exact = F.scaled_dot_product_attention(*(x.double() for x in heads), scale=0.7)
    check(output, eager.transpose(0, 1), exact.transpose(0, 1))


# Windows of a query alone, within a sequence, and as wide as all; biases that end within a sequence
# and beyond. The lengths lie on all of the CPU's ways, and beside its blocks of 128 queries.
OPTIONS = {
    "window-0": (0, None),
    "window-20": (20, None),
    "window-500": (500, None),
    "bias-10": (None, 10),
    "bias-300": (None, 300),
}
OPTION_LENGTHS = {
    "mixed": [15, 0, 1, 63, 64, 65],
    "equal-neighbours": [7, 7, 7, 3, 100, 100],
    "long": [127, 128, 129, 257],
}


@pytest.mark.parametrize("lengths", OPTION_LENGTHS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_attention_by_distance(backend: str, dtype: str, option: str, lengths: str) -> None:
    window, reach = OPTIONS[option]
    counts = OPTION_LENGTHS[lengths]
    total = sum(counts)
    qkv = torch.randn(total + 3, 3, 2, 16, dtype=DTYPES[dtype], device=DEVICE)
    bias = None
    if reach is not None:
        bias = torch.randn(2, 2 * reach + 3, dtype=DTYPES[dtype], device=DEVICE)[:, 1:-1]
    output = attention(
        *qkv.unbind(1),
        cumulative(counts),
        max(counts),
        window_size=window,
        relative_bias=bias,
        backend=backend,
    )
    assert (output[total:] == 0).all()
    for rows in torch.arange(total).split(counts):
        if len(rows):
            eager, exact = (
                distance_attention(qkv[rows].to(dtype), window, bias)
                for dtype in (qkv.dtype, torch.float64)
            )
            check(output[rows], eager, exact)


def distance_attention(
    qkv: torch.Tensor, window: int | None, bias: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = qkv.permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) * 0.25
    index = torch.arange(len(qkv), device=qkv.device)
    distance = index - index[:, None]
    if bias is not None:
        reach = bias.shape[1] // 2
        scores = scores + bias.to(qkv.dtype)[:, distance.clamp(-reach, reach) + reach]
    if window is not None:
        scores = scores.masked_fill(distance.abs() > window, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_a_bias_in_float32_keeps_its_digits(backend: str, dtype: str) -> None:
    # Rounded to the dtype of q first, these would differ by half and more.
    qkv = torch.zeros(100, 3, 1, 16, dtype=DTYPES[dtype], device=DEVICE)
    qkv[:, 2] = torch.randn(100, 1, 16)
    bias = 1000 + torch.rand(1, 41, device=DEVICE)
    output = attention(*qkv.unbind(1), cumulative([100]), 100, relative_bias=bias, backend=backend)
    exact = distance_attention(qkv.double(), None, bias)
    check(output, exact.to(qkv.dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [name for name in WITH_OPTIONS if name != "reference"])
def test_a_window_costs_nothing_outside_of_it(backend: str, dtype: str) -> None:
    # A NaN shows wherever it is looked at, be it behind a mask.
    qkv = torch.randn(1000, 3, 1, 16, dtype=DTYPES[dtype], device=DEVICE)
    qkv[:500, 1:] = float("nan")
    qkv[900:, 1:] = float("nan")
    output = attention(*qkv.unbind(1), cumulative([1000]), 1000, window_size=16, backend=backend)
    # 16 for the window and 127 for a block of queries to either side.
    assert output[500 + 143 : 900 - 143].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_window_on_the_cpu(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "isa", 0)
    # More scores of a block than its cache holds: SDPA, over keys of which many are masked.
    qkv = torch.randn(3000, 3, 4, 16, dtype=DTYPES[dtype])
    output = attention(
        *qkv.unbind(1), cumulative([3000]).cpu(), 3000, window_size=1300, backend="cpu"
    )
    eager, exact = (distance_attention(qkv.to(d), 1300, None) for d in (qkv.dtype, torch.float64))
    check(output, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layer_norm(backend: str, dtype: str) -> None:
    x, residual = torch.randn(2, 5, 48, device=DEVICE).to(DTYPES[dtype])
    weight, bias, x_bias = torch.randn(3, 48, device=DEVICE).to(DTYPES[dtype])
    output = add_layer_norm(x, residual, weight, bias, 1e-5, x_bias=x_bias, backend=backend)
    eager = F.layer_norm(x + x_bias + residual, (48,), weight, bias, 1e-5)
    wide = [t.double() for t in (x, x_bias, residual, weight, bias)]
    exact = F.layer_norm(wide[0] + wide[1] + wide[2], (48,), wide[3], wide[4], 1e-5)
    check(output, eager, exact)

    normed, total = add_layer_norm_sum(
        x, residual, weight, bias, 1e-5, x_bias=x_bias, backend=backend
    )
    assert torch.equal(normed, output)
    check(total, x + x_bias + residual, wide[0] + wide[1] + wide[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_embed_layer_norm(backend: str, dtype: str) -> None:
    word, position, token_type = (
        torch.randn(rows, 48, device=DEVICE).to(DTYPES[dtype]) for rows in (11, 7, 2)
    )
    weight, bias = torch.randn(2, 48, device=DEVICE).to(DTYPES[dtype])
    ids, positions, types = (torch.randint(0, high, (6,), device=DEVICE) for high in (11, 7, 2))
    output = embed_layer_norm(
        ids, word, positions, position, types, token_type, weight, bias, 1e-5, backend=backend
    )
    eager = F.layer_norm(
        word[ids] + token_type[types] + position[positions], (48,), weight, bias, 1e-5
    )
    wide = word.double()[ids] + token_type.double()[types] + position.double()[positions]
    check(output, eager, F.layer_norm(wide, (48,), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend: str, dtype: str, activation: str | None) -> None:
    x = torch.randn(5, 48, device=DEVICE).to(DTYPES[dtype])
    weight = (torch.randn(24, 48, device=DEVICE) / 7).to(DTYPES[dtype])
    bias = torch.randn(24, device=DEVICE).to(DTYPES[dtype])
    act = {
        None: lambda y: y,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }[activation]
    output = linear(x, weight, bias, activation=activation, backend=backend)
    exact = act(F.linear(x.double(), weight.double(), bias.double()))
    check(output, act(F.linear(x, weight, bias)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_rotary(backend: str, dtype: str) -> None:
    def turned(qk: torch.Tensor) -> torch.Tensor:
        wide = [torch.cat([t, t], dim=-1)[:, None, None].to(qk.dtype) for t in (cos, sin)]
        first, second = qk.chunk(2, dim=-1)
        return qk * wide[0] + torch.cat([-second, first], dim=-1) * wide[1]

    frequencies = 1e4 ** -(torch.arange(0, 32, 2, device=DEVICE) / 32)
    # more tokens than the CPU backend turns at a time in half precision
    cos, sin = rotary_tables(torch.arange(70, device=DEVICE), frequencies)
    qkv = torch.randn(70, 3, 2, 32, device=DEVICE).to(DTYPES[dtype])
    before = qkv.clone()
    assert rotary(qkv, cos, sin, backend=backend) is qkv
    assert torch.equal(qkv[:, 2], before[:, 2])
    check(qkv[:, :2], turned(before[:, :2]), turned(before[:, :2].double()))
    assert rotary(qkv[:0], cos[:0], sin[:0], backend=backend).shape == (0, 3, 2, 32)


# 516 inner features are the least of these that the CPU backend cuts into slices.
@pytest.mark.parametrize("inner", [24, 516])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward(backend: str, dtype: str, gated: bool, inner: int) -> None:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE) / 7).to(DTYPES[dtype])

    def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        w_in, b_in, w_out, b_out = weights
        y = F.linear(x, w_in, b_in)
        if gated:
            features, gate = y.chunk(2, dim=-1)
            return F.linear(F.gelu(features) * gate, w_out, b_out)
        return F.linear(F.gelu(y), w_out, b_out)

    rows = 2 * inner if gated else inner
    x, weights = random(9, 48), (random(rows, 48), random(rows), random(48, inner), random(48))
    prepared = prepare_feed_forward(*weights, "gelu", gated, backend)
    output = run_feed_forward(x, prepared, "gelu", backend)
    check(output, block(x, *weights), block(x.double(), *(w.double() for w in weights)))


Q = torch.zeros(4, 2, 16)
CU = torch.tensor([0, 4], dtype=torch.int32)
QKV = torch.zeros(4, 3, 2, 16)
COS = torch.zeros(4, 8)
X = torch.zeros(3, 8)
BIAS = torch.zeros(2, 5)
IDS = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(Q[0], Q[0], Q[0], CU, 4), r"\(total, H, D\)"),
        (lambda: attention(Q, Q[:2], Q, CU, 4), r"one shape .*\(2, 2, 16\)"),
        (lambda: attention(Q, Q.half(), Q, CU, 4), r"one dtype.*float16"),
        (lambda: attention(Q, Q, Q, CU.long(), 4), r"cu_seqlens must be int32.*int64"),
        (lambda: attention(Q, Q, Q, CU[:0], 4), r"cu_seqlens must be int32 of shape \(B \+ 1,\)"),
        (lambda: attention(Q, Q, Q, CU, -1), "max_seqlen must not be negative, got -1"),
        (lambda: attention(*[Q.transpose(1, 2)] * 3, CU, 4), "last stride must be 1"),
        (lambda: attention(Q, Q, Q, CU, 4, softmax_scale=0.0), "softmax_scale must be positive"),
        (lambda: attention(Q, Q, Q, CU, 4, window_size=-1), "window_size must be .* 0, got -1"),
        (lambda: attention(Q, Q, Q, CU, 4, relative_bias=X), r"H = 2, got \(3, 8\)"),
        (lambda: attention(Q, Q, Q, CU, 4, relative_bias=X[:2]), r"2 \* R \+ 1\).*\(2, 8\)"),
        (lambda: attention(Q, Q, Q, CU, 4, relative_bias=BIAS.half()), "float32 or .*float16"),
        (lambda: attention(Q, Q, Q, CU, 4, relative_bias=X.t()[:2]), "relative_bias's last stride"),
        (lambda: attention(Q, Q, Q, CU, 4, relative_bias=BIAS.to("meta")), "is on meta, q on cpu"),
        (
            lambda: attention(Q, Q, Q, CU, 4, window_size=2, relative_bias=BIAS),
            "window_size=None, got window_size=2",
        ),
        (lambda: attention(Q, Q, Q, CU, 4, backend="tpu"), "'auto' or one of .*'tpu'"),
        (lambda: attention(*[Q.double()] * 3, CU, 4, backend="cpu"), "'cpu' runs .*float64"),
        (lambda: add_layer_norm(X[0]), r"\(M, N\)"),
        (lambda: add_layer_norm(X, X[:2]), r"residual must be \(3, 8\)"),
        (lambda: add_layer_norm_sum(X, X[:2]), r"residual must be \(3, 8\)"),
        (lambda: add_layer_norm(X.t()), "x's last stride must be 1"),
        (lambda: add_layer_norm(X, weight=torch.zeros(7)), r"weight must be .*\(8,\), got \(7,\)"),
        (lambda: embed_layer_norm(IDS, X, IDS), "position_ids and position go together"),
        (lambda: embed_layer_norm(IDS.float(), X), "input_ids must be int64 or int32"),
        (lambda: embed_layer_norm(IDS.repeat(2)[::2], X), "input_ids must be contiguous"),
        (lambda: embed_layer_norm(IDS, X, IDS, X[:, :4]), r"position must be \(rows, 8\)"),
        (lambda: rotary(QKV[:, :2], COS, COS), r"\(total, 3, H, D\).*\(4, 2, 2, 16\)"),
        (lambda: rotary(QKV.transpose(0, 2), COS, COS), "qkv must be contiguous"),
        (lambda: rotary(QKV, COS, COS[:3]), r"sin must be .*\(4, 8\), got .*\(3, 8\)"),
        (lambda: rotary(QKV, COS.half(), COS), r"cos must be .*float32.* got torch.float16"),
        (lambda: rotary(QKV.double(), COS, COS, backend="cpu"), "'cpu' runs .*float64"),
        (lambda: linear(X, X.t()), r"don't fit: \(3, 8\), \(8, 3\)"),
        (lambda: linear(X, X, X[0]), r"bias must be .*\(3,\), got \(8,\)"),
        (lambda: linear(X, X, torch.zeros(6)[::2]), "bias must be contiguous"),
        (lambda: linear(X, X, activation="swish"), "activation must be None or one of .*'swish'"),
        (lambda: linear(X, X.half()), "weight is torch.float16"),
    ],
)
def test_bad_input(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_shows_nan(backend: str, activation: str | None) -> None:
    x = torch.full((2, 16), float("nan"), device=DEVICE)
    weight = torch.ones(16, 16, device=DEVICE)
    assert linear(x, weight, activation=activation, backend=backend).isnan().all()


def test_an_id_out_of_range_raises_on_the_cpu() -> None:
    with pytest.raises(IndexError):
        embed_layer_norm(IDS + 3, X, backend="cpu")


def test_no_gradient_is_lost_in_silence() -> None:
    with pytest.raises(RuntimeError, match="attention is for inference"):
        attention(Q.clone().requires_grad_(), Q, Q, CU, 4)
    with pytest.raises(RuntimeError, match="attention is for inference"):
        attention(Q, Q, Q, CU, 4, relative_bias=BIAS.clone().requires_grad_())
    with torch.no_grad():
        attention(Q.clone().requires_grad_(), Q, Q, CU, 4)


def all_ops(x: torch.Tensor, ids: torch.Tensor, cu: torch.Tensor, backend: str) -> torch.Tensor:
    on: dict[str, str] = {"backend": backend}
    q = x.view(-1, 1, 16)
    angles = x[:, :8].contiguous()
    q = rotary(torch.stack([q, q, q], dim=1), angles, angles, **on)[:, 0]
    y = attention(q, q, q, cu, 4, **on).flatten(1)
    y = y + attention(q, q, q, cu, 4, window_size=1, **on).flatten(1)
    y = y + attention(q, q, q, cu, 4, relative_bias=x[:1, :3], **on).flatten(1)
    y, total = add_layer_norm_sum(linear(y, x[:16], activation="gelu", **on), y, **on)
    y = add_layer_norm(y, total, **on)
    return y + embed_layer_norm(ids, x, **on)


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name == "triton")])
def test_torch_compile_sees_no_graph_break(backend: str) -> None:
    x = torch.randn(16, 16, device=DEVICE)
    ids = torch.arange(16, device=DEVICE)
    cu = cumulative([3, 4, 4, 4, 1])
    compiled = torch.compile(all_ops, fullgraph=True, backend="aot_eager")
    expected = all_ops(x, ids, cu, backend)
    torch.testing.assert_close(compiled(x, ids, cu, backend), expected)


OPS = ["attention", "add_layer_norm", "add_layer_norm_sum", "embed_layer_norm", "linear", "rotary"]


@pytest.mark.parametrize("name", OPS)
def test_registration(name: str) -> None:
    x = torch.randn(4, 16, device=DEVICE)
    q, ids = x.view(4, 1, 16), torch.arange(4, device=DEVICE)
    backend = "triton" if DEVICE == "cuda" else "cpu"
    arguments = {
        "attention": (q, q, q, cumulative([3, 1]), 3, 0.25, 1, None, backend),
        "add_layer_norm": (x, None, None, None, 1e-5, None, backend),
        "add_layer_norm_sum": (x, x, None, None, 1e-5, None, backend),
        "embed_layer_norm": (ids, None, None, x, None, None, None, None, 1e-5, backend),
        "linear": (x, x, None, "gelu", backend),
        "rotary": (
            torch.randn(4, 3, 1, 16, device=DEVICE),
            x[:, :8].clone(),
            x[:, 8:].clone(),
            backend,
        ),
    }[name]
    operator = getattr(torch.ops.encoder_fast, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
