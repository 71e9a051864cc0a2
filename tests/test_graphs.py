"""CUDA graphs: sizes are rounded up, what is recorded stays right, and nobody sees a difference.

Without a GPU the recorder of ``frozen_recorder.py`` stands in for the real one.
"""

import copy
import threading

import frozen_recorder
import graph_calls
import pytest
import torch
import transformers
import zoo
from berts import DEVICE, minilm_path, tiny
from graph_calls import FIRST, LENGTHS, call_of, expect_parity, graphs_of
from torch import Tensor, nn

import encoder_fast
from encoder_fast import TextEncoder
from encoder_fast.graphs import bucket, cache
from encoder_fast.graphs.bucket import Bucket
from encoder_fast.packing import pack_lengths
from encoder_fast.parity import compare
from encoder_fast.patching.packed import encode_packed
from encoder_fast.text.runner import Runner

backend = graph_calls.backend


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize(
    "family",
    ["bert", "electra", "albert", "xlm_roberta_xl", "modernbert", "mpnet", "deberta", "deberta_v2"],
)
def test_batches_of_one_bucket_share_a_graph(family: str, head: str, backend: str) -> None:
    model = zoo.build(family, head)
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    for seed, lengths in enumerate(LENGTHS):
        expect_parity(model, plain, call_of(model, lengths, seed))
    assert graphs_of(model) == (1, 3, FIRST)


def test_convolution(backend: str) -> None:
    model = zoo.build("deberta_v2", conv_kernel_size=3, conv_act="gelu")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    for seed, lengths in enumerate(LENGTHS):
        expect_parity(model, plain, call_of(model, lengths, seed))
    assert graphs_of(model)[:2] == (1, 3)


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta_v2"])
def test_masks_with_holes(family: str, backend: str) -> None:
    """A graph knows of packed tokens alone: no padded columns, which distances go by."""
    model = zoo.build(family)
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    for seed, lengths in enumerate(LENGTHS):
        call = call_of(model, lengths, seed)
        call["attention_mask"][0, 3] = 0
        expect_parity(model, plain, call)
    recorded, replayed, without = graphs_of(model)
    if family == "bert":
        assert (recorded, replayed) == (1, 3)
    else:
        assert recorded == 0
        assert without == {"a mask with holes, and attention that goes by distance": 4}


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton's own launches are recorded there")
@pytest.mark.parametrize("family", ["bert", "deberta_v2", "modernbert"])
def test_launches_of_triton(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher hands to its kernel serves every batch of the bucket."""
    frozen_recorder.install(monkeypatch)
    layers = {"num_hidden_layers": 2, "global_attn_every_n_layers": 2}
    model = zoo.build(family, **(layers if family == "modernbert" else {"num_hidden_layers": 1}))
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, "triton", cuda_graphs=True, strict=True)
    batches = ([7, 5, 4], [6, 6, 2], [10, 0, 3], [9, 1, 2, 4])
    if family == "bert":
        # long enough for tiles by slots instead of so many a text
        batches = ([19, 9, 6], [17, 8, 8], [30, 0, 3], [10, 1, 17, 5])
    for seed, lengths in enumerate(batches):
        expect_parity(model, plain, call_of(model, lengths, seed))
    assert graphs_of(model) == (1, 3, FIRST)


def test_packed_batches(backend: str) -> None:
    """Their lengths are known on the host; the same graphs serve them."""
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True)
    with torch.inference_mode():
        model(**call_of(model, LENGTHS[0]))
        for seed, lengths in enumerate(LENGTHS):
            call = call_of(model, lengths, seed)
            batch = pack_lengths(lengths, device=DEVICE)
            ids, types = batch.pack(call["input_ids"]), batch.pack(call["token_type_ids"])
            packed = encode_packed(model, batch, ids, types)
            padded = model(**call).last_hidden_state
            assert torch.equal(packed, batch.pack(padded))
    assert graphs_of(model) == (1, 8, FIRST)


def test_texts(backend: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    model, texts = tiny(vocab_size=30522), ["one text", "and another one"]
    wide = TextEncoder.from_pretrained(
        copy.deepcopy(model).double(), tokenizer, backend="reference"
    )
    encoder = TextEncoder.from_pretrained(model, tokenizer, backend=backend, cuda_graphs=True)
    exact, first, *others = (torch.from_numpy(e.encode(texts)) for e in (wide, *[encoder] * 3))
    assert graphs_of(model)[:2] == (1, 2)
    for vectors in others:
        assert compare("vectors", vectors, first, exact).ok


def test_sequences_of_the_tail_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = frozen_recorder.install(monkeypatch)
    model = encoder_fast.patch(zoo.build("bert"), "reference", cuda_graphs=True)
    with torch.inference_mode():
        for lengths in (LENGTHS[0], LENGTHS[3], LENGTHS[0], LENGTHS[3]):
            model(**call_of(model, lengths))
            for reads in recorder.reads:
                (starts,) = (x for x in reads if x.dtype == torch.int32)
                padded = [*lengths, 0, 0][:4]
                assert starts.diff().tolist() == padded
    assert len(recorder.reads) == 1


def test_results_outlive_later_calls(backend: str) -> None:
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    calls = [call_of(model, [16, 16], seed) for seed in range(4)]
    for call in calls:
        del call["attention_mask"]  # without padding unpacking is a view
    with torch.inference_mode():
        results = [model(**call).last_hidden_state for call in calls]
        again = [model(**call).last_hidden_state for call in calls]
    assert graphs_of(model)[1] == 7
    for result, expected in zip(results[1:], again[1:], strict=True):
        assert torch.equal(result, expected)
    assert not torch.equal(results[1], results[2])


def test_modes_may_change(backend: str) -> None:
    """Static buffers that were made in one mode are written in the other."""
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    for mode in (torch.no_grad, torch.inference_mode) * 2:
        with mode():
            result = model(**call_of(model, LENGTHS[0])).last_hidden_state
        assert result.is_inference() == (mode is torch.inference_mode)
    assert graphs_of(model)[:2] == (1, 3)


def test_the_limit_goes_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 12 * 768**2  # BERT-base's
    half = bucket.most_tokens(parameters, torch.float16)
    exact = bucket.most_tokens(parameters, torch.float32)
    monkeypatch.setattr(bucket, "float32_precision", lambda: "tf32")
    assert exact < bucket.most_tokens(parameters, torch.float32) < half == 3691
    assert bucket.fewest_tokens(parameters) == exact


def test_a_recording_that_fails_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = frozen_recorder.install(monkeypatch).cuda
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, "reference", cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    cuda.refusals["capture_end"] = [RuntimeError("refused")]
    # tried once
    for _ in range(4):
        expect_parity(model, plain, call)
    failed = {**FIRST, "recording failed: RuntimeError: refused": 3}
    assert graphs_of(model) == (0, 0, failed)
    other = call_of(model, [40, 3])
    for _ in range(3):
        expect_parity(model, plain, other)
    assert graphs_of(model)[:2] == (1, 2)
    # with the graphs of replaced weights goes what is known of failures
    for either in (model, plain):
        dense = either.encoder.layer[1].output.dense
        dense.weight = nn.Parameter(dense.weight.detach() * 1.5)
    for _ in range(3):
        expect_parity(model, plain, call)
    assert graphs_of(model)[:2] == (2, 4)


def test_the_oldest_graph_goes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_GRAPHS", 2)
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    small, middle, large = (call_of(model, [n]) for n in (5, 20, 35))
    with torch.inference_mode():
        for call in (small, small, middle, middle, small, large, large):
            model(**call)
        assert graphs_of(model)[:2] == (3, 4)
        model(**small)  # used later than the middle one
        assert graphs_of(model)[:2] == (3, 5)
        model(**middle)
        assert graphs_of(model)[2] == {"the first batch of its size": 4}


def test_threads_take_turns(backend: str) -> None:
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    calls = [call_of(model, lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    wrong: list[int] = []
    with torch.inference_mode():
        model(**calls[0])
        expected = [model(**call)[0] for call in calls]

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                if not torch.equal(model(**calls[number])[0], expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs_of(model) == (1, 24, FIRST)


def test_calls_without_a_graph_say_why(backend: str) -> None:
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        model(**call, output_hidden_states=True)
        embeds = model.embeddings.word_embeddings(call["input_ids"])
        model(inputs_embeds=embeds, attention_mask=call["attention_mask"])
        model(**{**call, "attention_mask": torch.zeros_like(call["attention_mask"])})
        model(input_ids=call["input_ids"][:0])
    left = {name: tensor.flip(1) for name, tensor in call.items()}
    expect_parity(model, plain, left)
    recorded, replayed, without = graphs_of(model)
    assert (recorded, replayed) == (1, 1)
    assert without == {
        **FIRST,
        "output_hidden_states": 1,
        "inputs_embeds": 1,
        "a batch without a token": 2,
        "a pooler or head over a padded first column (left padding)": 1,
    }
    text = str(encoder_fast.report(model))
    assert "CUDA graphs: 1 recorded, 1 calls replayed" in text
    assert "2 x without: a batch without a token" in text


def test_what_falls_back_counts_as_no_call_without(backend: str) -> None:
    model = zoo.build("bert")
    encoder_fast.patch(model, backend, cuda_graphs=True)
    call = call_of(model, LENGTHS[0])
    embeds = model.embeddings.word_embeddings(call.pop("input_ids")).detach()
    model.encoder.layer[0].output.dense.double()
    with torch.inference_mode(), pytest.raises(RuntimeError):
        model(inputs_embeds=embeds, **call)
    assert graphs_of(model) == (0, 0, {})
    assert sum(encoder_fast.report(model).fallbacks.values()) == 1


def test_large_batches_run_without(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "fewest_tokens", lambda *_: 0)
    monkeypatch.setattr(cache, "most_tokens", lambda *_: 40)
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    with torch.inference_mode():
        for lengths in ([20, 20], [20, 20], [20, 21], [20, 21]):
            model(**call_of(model, lengths))
    recorded, replayed, without = graphs_of(model)
    assert (recorded, replayed, sum(without.values())) == (1, 1, 3)
    assert any(reason.startswith("more than 40 tokens") for reason in without)


def test_token_types_and_positions_decide_too(backend: str) -> None:
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, backend, cuda_graphs=True, strict=True)
    call = call_of(model, LENGTHS[0])
    positions = torch.randint(0, 40, call["input_ids"].shape, device=DEVICE, dtype=torch.int32)
    untyped = {name: tensor for name, tensor in call.items() if name != "token_type_ids"}
    for variant in (call, untyped, {**call, "position_ids": positions}) * 2:
        expect_parity(model, plain, variant)
    # a graph for those with token types and one for those without
    assert graphs_of(model) == (2, 4, {"the first batch of its size": 2})


def test_copies_have_graphs_of_their_own(backend: str) -> None:
    model = encoder_fast.patch(zoo.build("bert"), backend, cuda_graphs=True)
    call = call_of(model, LENGTHS[0])
    with torch.inference_mode():
        for _ in range(2):
            model(**call)
        twin = copy.deepcopy(model)
        assert graphs_of(twin) == (0, 0, {})
        for _ in range(2):
            twin(**call)
    assert graphs_of(twin)[:2] == graphs_of(model)[:2] == (1, 1)
    assert encoder_fast.report(encoder_fast.patch(model)).encoders[0].graphs is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_device_without_graphs_is_refused(backend: str) -> None:
    model = zoo.build("bert").cpu()
    with pytest.raises(encoder_fast.BackendUnavailableError, match=r"on an NVIDIA GPU.* on cpu"):
        encoder_fast.patch(model, backend, cuda_graphs=True)
    assert type(model) is transformers.BertModel
    with pytest.raises(encoder_fast.BackendUnavailableError, match="cuda_graphs=True"):
        Runner(model, backend, cuda_graphs=True)
    with (
        pytest.raises(encoder_fast.BackendUnavailableError),
        encoder_fast.patched(model, backend, cuda_graphs=True),
    ):
        pass


@pytest.mark.gpu
def test_a_model_that_left_the_gpu_is_refused() -> None:
    model = encoder_fast.patch(zoo.build("bert"), cuda_graphs=True).cpu()
    call = {name: tensor.cpu() for name, tensor in call_of(model, LENGTHS[0]).items()}
    with torch.inference_mode(), pytest.raises(encoder_fast.BackendUnavailableError):
        model(**call)


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max().item()


def test_a_foreign_activation_is_refused(backend: str) -> None:
    model = zoo.build("bert")
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = Squash()
    with pytest.raises(encoder_fast.UnsupportedModelError, match="cuda_graphs=True, and an activ"):
        encoder_fast.patch(model, backend, cuda_graphs=True)
    encoder_fast.patch(model, backend)


@pytest.mark.gpu
def test_streams_wait_for_one_another() -> None:
    """One graph, used from two streams at once: the second must not write over the first's ids."""
    model = encoder_fast.patch(zoo.build("bert"), cuda_graphs=True)
    calls = [call_of(model, lengths, seed) for seed, lengths in enumerate(LENGTHS[:2])]
    with torch.inference_mode():
        model(**calls[0])
        expected = [model(**call)[0] for call in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        results = []
        for _ in range(20):
            for stream, call in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    results.append(model(**call)[0])
        torch.cuda.synchronize()
    for result, wanted in zip(results, expected * 20, strict=True):
        assert torch.equal(result, wanted)


def test_a_mask_inside_a_graph_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read its lengths would break the graph. The original reads nothing."""
    model = zoo.build("bert")
    plain = copy.deepcopy(model)
    encoder_fast.patch(model, "reference")
    call = call_of(model, LENGTHS[0])
    monkeypatch.setattr("encoder_fast.patching.inputs.is_captured", lambda _: True)
    with torch.inference_mode():
        assert torch.equal(model(**call)[0], plain(**call)[0])
        model(call["input_ids"])
    report = encoder_fast.report(model)
    (reason,) = report.fallbacks
    assert reason.startswith("an attention_mask") and report.fast_calls == 1


@pytest.mark.gpu
def test_inside_a_graph_of_the_caller() -> None:
    model = encoder_fast.patch(zoo.build("bert"), cuda_graphs=True)
    plain = encoder_fast.unpatch(copy.deepcopy(model))
    ids = call_of(model, [16, 16])["input_ids"]
    with torch.inference_mode():
        expected, original = model(ids)[0], plain(ids)[0]
        model(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(ids)[0]
            masked = model(ids, attention_mask=torch.ones_like(ids))[0]
        graph.replay()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(masked, original)
    assert "the caller records a CUDA graph of its own" in graphs_of(model)[2]


@pytest.mark.gpu
def test_beside_a_graph_of_the_caller() -> None:
    """Recorded on a stream that the model was used on, while its weights change."""
    model = encoder_fast.patch(zoo.build("deberta_v2"))
    ids = call_of(model, [16, 16])["input_ids"]
    side, graph, x = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
    with torch.inference_mode():
        before = model(ids)[0]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids)
        with torch.no_grad():
            model.encoder.layer[0].attention.self.key_proj.weight.mul_(2)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="relaxed")
            doubled = x + x
        try:
            during = model(ids)[0]
        finally:
            with torch.cuda.stream(side):
                graph.capture_end()
        graph.replay()
        after = model(ids)[0]
    assert torch.equal(during, after) and (during - before).abs().max() > 1e-3
    assert torch.equal(doubled, 2 * x)


def test_buckets_hold_their_batches_and_waste_little() -> None:
    for total in (*range(1, 700), 1000, 4095, 4096, 4097, 8816):
        found = Bucket.of(pack_lengths([total]))
        assert total <= found.total < total + max(16, total / 8)
        assert total <= found.max_seqlen < max(17, 2 * total)
        assert Bucket.of(pack_lengths([found.total])).total == found.total
    for count in range(1, 70):
        found = Bucket.of(pack_lengths([3] * count))
        assert count <= found.batch_size < 2 * count or count == found.batch_size == 1
