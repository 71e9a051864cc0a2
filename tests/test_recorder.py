"""The recorder of CUDA graphs over a CUDA without a GPU: pools, streams, threads and failures."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import Buffer, FakeCuda, OutOfMemoryError, Stream
from torch import Tensor

from encoder_fast.graphs import recorder
from encoder_fast.graphs.recorder import CudaRecorder, Recording, RecordingFailedError

HOME = Stream(0)


@pytest.fixture(params=["2.11", "later"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """By the version of PyTorch."""
    fake = FakeCuda(is_later=request.param == "later")
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def device_recorder(cuda: FakeCuda) -> CudaRecorder:
    return CudaRecorder(torch.device("cuda", 0))


def forward(cuda: FakeCuda, kernel: str = "norm") -> Callable[[], Tensor]:
    def run() -> Tensor:
        cuda.gemm()
        cuda.launch(kernel)
        return torch.zeros(1)

    return run


def replay(cuda: FakeCuda, of: CudaRecorder, recording: Recording) -> list[str]:
    """What a replay launches."""
    with of.turn():
        recording.replay()
    return cuda.ran[-1][1]


def test_what_is_recorded_runs_again(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    run = forward(cuda)
    recording = device_recorder.record(run, [])
    # once as an ordinary call, on the caller's stream, and then nothing until it is replayed
    assert cuda.ran == [(HOME, ["gemm"]), (HOME, ["norm"])]
    for _ in range(2):
        assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_the_stream_to_record_on_comes_after_the_callers_and_before_it(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    """PyTorch writes there what graphs of the caller may read."""
    device_recorder.record(forward(cuda), [])
    own = cuda.waits[0][0]
    assert own != HOME
    assert cuda.waits == [(own, HOME), (HOME, own)]


def test_recorded_again_after_all_were_dropped(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    """With cuBLAS's workspace in the pool, PyTorch 2.11 refuses one that no graph uses."""
    for count in range(1, 4):
        recordings = [device_recorder.record(forward(cuda), []) for _ in range(count)]
        for recording in recordings:
            assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]
        # torch.compile clears the workspaces of all streams, users the cache
        cuda.clear_workspaces()
        for recording in recordings:
            assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]
        del recording, recordings


def test_other_graphs_outlive_one_that_goes(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    kept, dropped, *_ = (device_recorder.record(forward(cuda, name), []) for name in "abc")
    del dropped
    cuda.empty_cache()
    assert replay(cuda, device_recorder, kept) == ["gemm", "a"]


@pytest.mark.parametrize("call", ["capture_begin", "launch", "capture_end"])
def test_a_failure_leaves_no_trace(
    call: str, cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    """Also as the first recording of all."""
    earlier: list[Recording] = []
    for _ in range(2):
        cuda.refusals[call] = [RuntimeError("refused")]
        with pytest.raises(RecordingFailedError, match="RuntimeError: refused"):
            device_recorder.record(forward(cuda), [])
        assert cuda.current_stream() == HOME
        assert cuda.is_clean
        assert gc.isenabled()
        gc.collect()  # the graph that the error's traceback still has
        earlier.append(device_recorder.record(forward(cuda), []))
        for recording in earlier:
            assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_one_failure_after_another(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    errors: list[BaseException] = [RuntimeError("refused") for _ in range(5)]
    cuda.refusals["capture_end"] = errors
    with pytest.raises(RecordingFailedError):
        device_recorder.record(forward(cuda), [])
    # it, and the recording that was to mend what it left behind
    assert len(errors) == 3
    errors.clear()
    gc.collect()
    recording = device_recorder.record(forward(cuda), [])
    assert cuda.is_clean
    assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_what_failures_keep_is_bounded(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    earlier = device_recorder.record(forward(cuda), [])
    cuda.refusals["capture_end"] = [RuntimeError("refused") for _ in range(100)]
    for _ in range(30):
        with pytest.raises(RecordingFailedError):
            device_recorder.record(forward(cuda), [])
    # Each keeps a pool and its workspace.
    assert len(cuda.refusals["capture_end"]) == 100 - recorder._MOST_ABANDONED
    with pytest.raises(RecordingFailedError, match="8 others did not end on this GPU"):
        device_recorder.record(forward(cuda), [])
    assert replay(cuda, device_recorder, earlier) == ["gemm", "norm"]


def test_a_forward_that_fails_fails_the_recording(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    def run() -> Tensor:
        raise OutOfMemoryError("full")

    with pytest.raises(RecordingFailedError, match="full"):
        device_recorder.record(run, [])
    device_recorder.record(forward(cuda), [])


@pytest.mark.parametrize("call", ["begun", "launch"])
def test_an_interrupt_passes(call: str, cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    cuda.refusals[call] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        device_recorder.record(forward(cuda), [])
    assert cuda.current_stream() == HOME
    assert cuda.is_clean
    device_recorder.record(forward(cuda), [])


def test_room_is_made(
    cuda: FakeCuda, device_recorder: CudaRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the allocator keeps for later is given back, where that lets a graph be recorded."""
    emptied: list[bool] = []
    fake: Any = recorder.torch
    monkeypatch.setattr(fake.cuda, "empty_cache", lambda: emptied.append(cuda.is_clean))
    device_recorder.record(forward(cuda), [])
    assert not emptied
    cuda.refusals["launch"] = [OutOfMemoryError("full")]
    recording = device_recorder.record(forward(cuda), [])
    assert emptied == [True]
    assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_nobody_else_is_on_the_stream(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    """PyTorch's own streams come again after the 32nd."""
    users = {cuda.Stream() for _ in range(40)}
    assert len(users) == 32
    home = forward(cuda)

    def run() -> Tensor:
        def work() -> None:
            for stream in users:
                with cuda.stream(stream):
                    cuda.launch("a user's")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return home()

    recordings = [device_recorder.record(run, []) for _ in range(33)]
    for recording in recordings:
        assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_no_stream_is_no_recording(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    cuda.stream_error = 2
    with pytest.raises(RecordingFailedError, match="cuStreamCreate failed with error 2"):
        device_recorder.record(forward(cuda), [])
    cuda.stream_error = 0
    device_recorder.record(forward(cuda), [])


def test_models_of_a_device_share_a_recorder(cuda: FakeCuda) -> None:
    """And so its stream, which is never given back."""
    recorder._recorder_of.cache_clear()
    first, second = (recorder.recorder_for("triton", torch.device("cuda", 0)) for _ in range(2))
    recorder._recorder_of.cache_clear()
    assert first is second


def test_what_another_thread_records_is_left_alone(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    """No wait for the whole device: it would break the other recording."""
    fake: Any = recorder.torch
    graph = fake.cuda.CUDAGraph()
    mine, theirs = threading.Event(), threading.Event()

    def other() -> None:
        with cuda.stream(cuda.Stream()):
            graph.capture_begin(pool=(1, 0), capture_error_mode="thread_local")
            theirs.set()
            assert mine.wait(10)
            cuda.launch("theirs")
            graph.capture_end()

    thread = threading.Thread(target=other)
    thread.start()
    assert theirs.wait(10)
    recording = device_recorder.record(forward(cuda), [])
    mine.set()
    thread.join()
    assert graph.kernels == ["theirs"]
    graph.replay()
    assert replay(cuda, device_recorder, recording) == ["gemm", "norm"]


def test_garbage_is_not_collected_while_recording(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            cuda.launch("a finaliser's")

    def run() -> Tensor:
        for _ in range(2 * gc.get_threshold()[0]):
            Garbage()
        return forward(cuda)()

    recording = device_recorder.record(run, [])
    assert gc.isenabled()
    assert "a finaliser's" not in replay(cuda, device_recorder, recording)


def test_turns_come_one_after_another(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    recording = device_recorder.record(forward(cuda), [])
    streams = [cuda.Stream() for _ in range(2)]
    cuda.waits.clear()
    for stream in streams:
        with cuda.stream(stream):
            replay(cuda, device_recorder, recording)
    # the second stream waits for what the first one ran
    assert cuda.waits == [(streams[1], streams[0])]
    assert [stream for stream, _ in cuda.ran[-2:]] == streams


def in_the_meantime(work: Callable[[], object]) -> threading.Thread:
    """``work`` in a thread of its own, which has begun and had some time to end."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.05)
    return thread


def test_a_turn_keeps_other_turns_out(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    recording = device_recorder.record(forward(cuda), [])
    with device_recorder.turn():
        thread = in_the_meantime(lambda: replay(cuda, device_recorder, recording))
        assert thread.is_alive()
    thread.join()


def test_a_recording_keeps_other_recordings_out_and_no_turn(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    earlier = device_recorder.record(forward(cuda), [])
    recordings: list[Recording] = []
    threads: list[threading.Thread] = []

    def work() -> None:
        recordings.append(device_recorder.record(forward(cuda, "other"), []))

    def run() -> Tensor:
        in_a_recording = cuda.current_stream() != HOME
        if in_a_recording:
            threads.append(in_the_meantime(work))
            turn = in_the_meantime(lambda: replay(cuda, device_recorder, earlier))
            turn.join(10)
            assert threads[0].is_alive()
            assert not turn.is_alive()
        return forward(cuda)()

    recordings.append(device_recorder.record(run, []))
    threads[0].join()
    found = [replay(cuda, device_recorder, recording)[-1] for recording in recordings]
    assert sorted(found) == ["norm", "other"]


def test_what_a_replay_reads_is_kept_for_its_stream(
    cuda: FakeCuda, device_recorder: CudaRecorder
) -> None:
    buffers: list[Any] = [Buffer(), Buffer()]
    recording = device_recorder.record(forward(cuda), buffers)
    replay(cuda, device_recorder, recording)
    other = cuda.Stream()
    for _ in range(2):
        with cuda.stream(other):
            replay(cuda, device_recorder, recording)
    # Not all that is read was made on the stream of the recording.
    assert all(buffer.streams == [HOME, other] for buffer in buffers)


def test_inside_a_recording_of_the_caller(cuda: FakeCuda, device_recorder: CudaRecorder) -> None:
    fake: Any = recorder.torch
    assert device_recorder.why_not_now() is None
    graph = fake.cuda.CUDAGraph()
    with cuda.stream(cuda.Stream()):
        graph.capture_begin(pool=(1, 0), capture_error_mode="thread_local")
        assert device_recorder.why_not_now() == "the caller records a CUDA graph of its own"
        graph.capture_end()


@pytest.mark.gpu
def test_on_a_card() -> None:
    """What the fake takes for granted: failures, other threads and drops, as CUDA has them."""
    device_recorder = CudaRecorder(torch.device("cuda", 0))
    x = torch.randn(64, 64, device="cuda")
    expected = x @ x
    home = torch.cuda.current_stream()

    def waits() -> Tensor:
        product = x @ x
        product.sum().item()
        return product

    def multiply() -> Tensor:
        return x @ x

    def expect_right(recording: Recording) -> None:
        with device_recorder.turn():
            recording.output.zero_()
            recording.replay()
            torch.testing.assert_close(recording.output, expected)

    graph, theirs, mine = torch.cuda.CUDAGraph(), threading.Event(), threading.Event()

    def other() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="thread_local")
            theirs.set()
            mine.wait(10)
            graph.capture_end()

    for _ in range(2):
        with pytest.raises(RecordingFailedError):
            device_recorder.record(waits, [])
        assert torch.cuda.current_stream() == home
        torch.rand(1, device="cuda")
        for _ in range(2):  # each is dropped
            expect_right(device_recorder.record(multiply, []))
            torch.cuda.empty_cache()
    thread = threading.Thread(target=other)
    thread.start()
    assert theirs.wait(10)
    expect_right(device_recorder.record(multiply, []))
    mine.set()
    thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert device_recorder._stream not in [torch.cuda.Stream() for _ in range(40)]
