"""Buffers that one CUDA stream writes and others read: who waits for whom. CUDA is faked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from berts import tiny

import encoder_fast
from encoder_fast import streams, weights
from encoder_fast.streams import StreamOrder


class FakeStream:
    """Its log is the work put in, in order; ``b:2`` is what stream b was given before its third."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[str] = []
        self.is_captured = False

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"wait {event.at}")

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event


class FakeEvent:
    at = ""

    def record(self, stream: FakeStream) -> None:
        assert not stream.is_captured, "whoever waits for it becomes a part of the graph"
        self.at = f"{stream.name}:{len(stream.log)}"


class FakeBuffer:
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.told: list[str] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.told.append(stream.name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``torch.cuda`` with a settable current stream."""
    fake = SimpleNamespace(Event=FakeEvent, current=FakeStream("a"))
    fake.current_stream = lambda device: fake.current
    inside: list[torch.device] = []
    fake.is_current_stream_capturing = lambda: bool(inside) and fake.current.is_captured

    @contextmanager
    def stream(stream: FakeStream) -> Iterator[None]:
        before, fake.current = fake.current, stream
        yield
        fake.current = before

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        inside.append(index)
        yield
        inside.remove(index)

    fake.stream, fake.device = stream, device
    monkeypatch.setattr(streams, "cuda", fake)
    return fake


def test_readers_wait_once_and_the_allocator_is_told_once(cuda: Any) -> None:
    a, b, buffer = cuda.current, FakeStream("b"), FakeBuffer()
    order = StreamOrder([buffer])
    order.before_reading()
    cuda.current = b
    for _ in range(3):
        order.before_reading()
    assert (a.log, b.log, buffer.told) == ([], ["wait a:0"], ["a", "b"])


def test_a_write_comes_after_all_reads_and_before_the_next_ones(cuda: Any) -> None:
    a, b, c, buffer = cuda.current, FakeStream("b"), FakeStream("c"), FakeBuffer()
    order = StreamOrder([buffer])
    for stream in (b, a):
        cuda.current = stream
        order.before_reading()
        stream.log.append("read")
    cuda.current = c
    assert order.write(lambda: c.log.append("write"))
    assert sorted(c.log[:-1]) == ["wait a:0", "wait a:1", "wait b:2"] and c.log[-1] == "write"
    for stream in (a, b, a):
        cuda.current = stream
        order.before_reading()
    assert a.log == ["read", "wait c:4"] and b.log == ["wait a:0", "read", "wait c:4"]
    assert buffer.told == ["a", "b", "c"]


def test_alone_on_its_stream_nobody_waits(cuda: Any) -> None:
    a, buffer = cuda.current, FakeBuffer()
    order = StreamOrder([buffer])
    order.before_reading()
    assert order.write(lambda: a.log.append("write"))
    order.before_reading()
    # The model's own weights were made on some other stream.
    assert a.log == ["write"] and buffer.told == ["a"]


def test_a_stream_that_somebody_records_is_left_alone(cuda: Any) -> None:
    """Whatever it ran before, nobody can wait for it now."""
    a, b = cuda.current, FakeStream("b")
    order = StreamOrder([FakeBuffer()])
    cuda.current = b
    order.before_reading()
    b.is_captured, cuda.current = True, a
    assert not streams.is_captured(FakeBuffer.device)
    assert not order.write(lambda: a.log.append("write"))
    assert (a.log, b.log) == ([], ["wait a:0"])
    b.is_captured = False
    assert order.write(lambda: a.log.append("write"))
    assert a.log == ["wait b:1", "write"]


def test_each_use_of_weights_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    captured: list[str] = []

    def write(launch: Callable[[], None]) -> bool:
        log.append("write")
        if not captured:
            launch()
        return not captured

    order = SimpleNamespace(before_reading=lambda: log.append("read"), write=write)
    monkeypatch.setattr(StreamOrder, "of", lambda buffers: order)
    model = encoder_fast.patch(tiny(), "reference")
    cache = model.__dict__["_encoder_fast"]._reading.cache
    like = model.embeddings.word_embeddings.weight
    first = cache.current(like, 1)
    assert log == []
    assert cache.current(like, 1) is first and cache.may_run_ahead(first, 1)
    assert log == ["read", "read"]
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key.bias.add_(1)
    assert cache.current(like, 1) is first
    assert log == ["read", "read", "write"]
    captured.append("a stream that has read")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key.bias.add_(1)
    second = cache.current(like, 1)
    # Buffers of their own: the old ones stay as they are.
    assert not torch.equal(second.layers[0].qkv.bias, first.layers[0].qkv.bias)
    assert cache.current(like, 1) is second
    assert log == ["read", "read", "write", "write", "read"]


@pytest.mark.parametrize("family", ["bert", "deberta", "deberta_v2", "mpnet"])
def test_all_that_is_made_from_weights_is_put_in_order(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks, tables, and where attention goes by distance, which row each distance has."""
    ordered: list[torch.Tensor] = []
    monkeypatch.setattr(StreamOrder, "of", ordered.extend)
    model = encoder_fast.patch(zoo.build(family), "reference")
    cache = model.__dict__["_encoder_fast"]._reading.cache
    prepared = cache.current(model.embeddings.word_embeddings.weight, 1)
    of_model = storages([*model.embeddings.parameters(), *model.encoder.parameters()])
    # A graph that is launched ahead of the look reads the model's own as well.
    assert of_model <= storages(prepared) == storages(ordered)
    assert (prepared.row_of_distance is None) == (family == "bert")
    # In a graph of the caller nothing is there before it runs, so nothing of it is kept.
    monkeypatch.setattr(weights, "is_captured", lambda _: True)
    inside = cache.current(model.embeddings.word_embeddings.weight, 1)
    assert storages(inside) & storages(prepared) <= of_model


def storages(prepared: Any) -> set[int]:
    """Where the tensors in some dataclasses, lists and tuples lie."""
    if isinstance(prepared, torch.Tensor):
        return {prepared.untyped_storage().data_ptr()}
    if is_dataclass(prepared):
        prepared = [getattr(prepared, field.name) for field in fields(prepared)]
    if isinstance(prepared, list | tuple):
        return set().union(*map(storages, prepared))
    return set()
