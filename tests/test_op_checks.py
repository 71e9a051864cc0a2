"""What the ops and a patched model refuse, because kernels that take addresses would believe it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_backends import kernel_backends
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

import encoder_fast
import encoder_fast.engine
import encoder_fast.ops.pool
from encoder_fast.backends import why_not
from encoder_fast.ops import add_layer_norm as norms
from encoder_fast.ops import attention as attentions
from encoder_fast.ops.attention import attention
from encoder_fast.ops.disentangled_attention import disentangled_attention
from encoder_fast.ops.pool import pool

BACKENDS = [name for name in ("cpu", "reference", *kernel_backends()) if name != "cuda"]
ON_CPU = [name for name in BACKENDS if why_not(name, torch.device("cpu")) is None]


def operands(op: str, backend: str) -> dict[str, Any]:
    """Arguments of a registered op, by the names in its schema."""
    dtype = torch.float16 if backend == "cuda-host" and "attention" in op else torch.float32
    x, vector = torch.randn(8, 32), torch.randn(32)
    q = torch.randn(8, 2, 32, dtype=dtype)
    ids = torch.arange(4)
    lengths = {"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32), "max_seqlen": 5}
    norm = {"x": x, "residual": x.clone(), "weight": vector, "bias": vector.clone(), "eps": 1e-5}
    return {
        "attention": {"q": q, "k": q.clone(), "v": q.clone(), **lengths, "softmax_scale": 0.2}
        | {"window_size": None, "relative_bias": None},
        "disentangled_attention": {"q": q, "k": q.clone(), "v": q.clone()}
        | {"pos_key": q[:4].clone(), "pos_query": q[:4].clone()}
        | {"row_of_distance": torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)}
        | {**lengths, "softmax_scale": 0.2},
        "add_layer_norm": norm | {"x_bias": vector.clone()},
        "add_layer_norm_sum": norm | {"x_bias": vector.clone()},
        "embed_layer_norm": {"input_ids": ids, "position_ids": ids.clone()}
        | {"token_type_ids": ids.clone(), "word": x, "position": x.clone()}
        | {"token_type": x.clone(), "weight": vector, "bias": vector.clone(), "eps": 1e-5},
        "linear": {"x": x, "weight": x.clone(), "bias": x[:, 0].clone(), "activation": None},
        "pool": {"x": x, "cu_seqlens": lengths["cu_seqlens"], "mode": "mean"},
        "rotary": {"qkv": torch.randn(4, 3, 2, 32), "cos": torch.ones(4, 16)}
        | {"sin": torch.ones(4, 16)},
    }[op] | {"backend": backend}


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.encoder_fast, op)(*arguments.values())


TENSORS = [
    (op, name)
    for op in (
        *("attention", "disentangled_attention", "add_layer_norm", "add_layer_norm_sum"),
        *("embed_layer_norm", "linear", "pool", "rotary"),
    )
    for name, value in operands(op, "cpu").items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_operand_without_memory(op: str, name: str, left: int) -> None:
    # Ahead of any backend's code, so one of them stands for all.
    arguments = operands(op, "cpu")
    call(op, arguments)
    arguments[name].untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=f"^{name} of shape .* storage was freed"):
        call(op, arguments)


def test_a_bias_by_distance_without_memory() -> None:
    arguments = operands("attention", "cpu") | {"relative_bias": torch.randn(2, 5)}
    call("attention", arguments)
    arguments["relative_bias"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="relative_bias of shape"):
        call("attention", arguments)


def test_a_view_that_ends_behind_its_storage() -> None:
    arguments = operands("attention", "cpu")
    qkv = torch.randn(8, 3, 2, 32)
    arguments |= dict(zip("qkv", qkv.unbind(1), strict=True))
    call("attention", arguments)
    # All of q and k is there, and of v all but its last element.
    qkv.untyped_storage().resize_(qkv.nbytes - 4)
    with pytest.raises(ValueError, match=r"^v of shape"):
        call("attention", arguments)


def test_nothing_is_missing_where_nothing_is_needed() -> None:
    none = torch.randn(0, 32)
    assert none.data_ptr() == 0
    assert norms.add_layer_norm(none, none, torch.randn(32)).shape == (0, 32)
    q = torch.randn(0, 2, 32)
    assert attention(q, q, q, torch.zeros(3, dtype=torch.int32), 0).shape == q.shape


@pytest.mark.parametrize("name", ["residual", "weight", "bias", "x_bias"])
def test_the_engines_way_in_refuses_the_address_0(name: str) -> None:
    arguments = operands("add_layer_norm", "cpu")
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"storage was freed|not allocated"):
        norms.operator.run(*arguments.values())


WRONG = {
    "empty": [],
    "begins later": [4, 8],
    "below 0": [-3, 8],
    "falls": [0, 6, 3, 8],
    "falls below 0": [0, -1, 8],
    "ends behind": [0, 9],
    "far behind": [0, 2**31 - 1],
    "longer than max_seqlen": [0, 1, 8],
}


@pytest.mark.parametrize("op", ["attention", "disentangled_attention", "pool"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_lengths_that_do_not_fit(backend: str, op: str) -> None:
    for case, values in WRONG.items():
        if op == "pool" and case == "longer than max_seqlen":
            continue
        arguments = operands(op, backend) | {"cu_seqlens": torch.tensor(values, dtype=torch.int32)}
        with pytest.raises(ValueError, match="max_seqlen" if "max" in case else "cu_seqlens"):
            call(op, arguments)


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int64": lambda cu: cu.long(),
    "of two dimensions": lambda cu: cu[None],
    "with gaps": lambda cu: cu.repeat_interleave(2)[::2],
    "elsewhere": lambda cu: cu.to("meta"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["attention", "disentangled_attention", "pool"])
def test_lengths_of_another_form(op: str, form: str) -> None:
    arguments = operands(op, "cpu")
    arguments["cu_seqlens"] = FORMS[form](arguments["cu_seqlens"])
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        call(op, arguments)
    q, rows = torch.randn(8, 2, 32), torch.zeros(5, dtype=torch.int32)
    public = {
        "attention": lambda cu: attention(q, q, q, cu, 5),
        "disentangled_attention": lambda cu: disentangled_attention(q, q, q, cu, 5, rows),
        "pool": lambda cu: pool(q.flatten(1), cu),
    }[op]
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        public(arguments["cu_seqlens"])


@pytest.mark.parametrize("backend", ["tpu", "auto", "triton", "cuda"])
def test_a_registered_op_takes_backends_that_run_there(backend: str) -> None:
    if backend in ON_CPU:
        pytest.skip("it does")
    arguments = operands("add_layer_norm", "cpu") | {"backend": backend}
    with pytest.raises((ValueError, encoder_fast.BackendUnavailableError)):
        call("add_layer_norm", arguments)


def test_lengths_that_change_while_they_are_read() -> None:
    # Right or refused; read a second time behind the check, they would lead beyond the memory.
    q = torch.randn(4, 1, 16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    expected = attention(q, q, q, cu, 4)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            cu[1] = 2**30
            cu[1] = 4

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            try:
                output = attentions.operator.run(q, q, q, cu, 2**30, 0.25, None, None, "cpu")
            except ValueError as error:
                assert "cu_seqlens" in str(error)
            else:
                torch.testing.assert_close(output, expected)
    finally:
        done.set()
        writer.join()


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(hidden_size=32, intermediate_size=64, **SIZES)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(
            hidden_size=32,
            intermediate_size=64,
            bos_token_id=1,
            eos_token_id=2,
            **SIZES,
            **TOKENS,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_whose_memory_was_freed(kind: str) -> None:
    ids = torch.arange(9)[None]
    model = encoder_fast.patch(MODELS[kind]().eval())
    in_stack = [name for name, _ in model.named_parameters() if "pooler" not in name]
    for name in (*in_stack, *(name for name, _ in model.named_buffers())):
        if "original" in name or "token_type_ids" in name:
            continue  # nobody reads these
        model = encoder_fast.patch(MODELS[kind]().eval())
        tensor = dict((*model.named_parameters(), *model.named_buffers()))[name]
        with torch.inference_mode():
            model(ids)
            tensor.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="storage"):
                model(ids)
        assert not encoder_fast.report(model).fallbacks


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
def test_an_input_whose_memory_was_freed(name: str) -> None:
    model = encoder_fast.patch(MODELS["bert"]().eval())
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)}
    inputs |= {"token_type_ids": torch.zeros(1, 9).long(), "position_ids": torch.arange(9)[None]}
    inputs[name].untyped_storage().resize_(0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"storage of {name} was freed"):
        model(**inputs)
