"""Host buffers are reused only after their copy is complete."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bigan.data.streaming import device as devices


class Event:
    """Replaces a CUDA event; the test sets when the copy is complete."""

    def __init__(self) -> None:
        self.complete = False
        self.waited = 0
        self.recorded = 0

    def record(self, stream: object) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return self.complete

    def synchronize(self) -> None:
        self.waited += 1
        self.complete = True


@pytest.fixture
def to_cuda(monkeypatch: pytest.MonkeyPatch) -> devices.ToCuda:
    empty = torch.empty

    def unpinned(*shape: object, pin_memory: bool = False, **kinds: object) -> torch.Tensor:
        assert pin_memory
        return empty(*shape, **kinds)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", unpinned)
    return devices.ToCuda(torch.device("cpu"), (2, 2, 3), prefetch=1)


def test_a_buffer_waits_for_its_copy(to_cuda: devices.ToCuda) -> None:
    first = to_cuda.take(4)
    sent = to_cuda.send(first)
    others = [to_cuda.take(4) for _ in range(4)]
    assert all(other is not first for other in others)  # its copy may be running
    sent.event.complete = True  # type: ignore[attr-defined]
    assert to_cuda.take(4) is first


def test_the_ring_is_bounded_and_then_waits(to_cuda: devices.ToCuda) -> None:
    batches, events = [], []
    for _ in range(5):  # prefetch + 4
        batches.append(to_cuda.take(4))
        events.append(to_cuda.send(batches[-1]).event)  # type: ignore[attr-defined]
    assert not any(event.waited for event in events)
    assert to_cuda.take(4) is batches[0]
    assert [event.waited for event in events] == [1, 0, 0, 0, 0]


def test_other_sizes_get_other_buffers(to_cuda: devices.ToCuda) -> None:
    small = to_cuda.take(2)
    to_cuda.send(small).event.complete = True  # type: ignore[attr-defined]
    big = to_cuda.take(4)
    assert big.pixels.shape == (4, 2, 2, 3)
    assert to_cuda.take(2) is small


def test_a_batch_arrives_after_its_copy(
    to_cuda: devices.ToCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def __init__(self) -> None:
            self.waited: list[object] = []

        def wait_event(self, event: object) -> None:
            self.waited.append(event)

    current, users = Stream(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, user: users.append(user))
    sent = to_cuda.send(to_cuda.take(4))
    event = sent.event  # type: ignore[attr-defined]
    assert event.recorded == 1
    sent.arrive()
    assert current.waited == [event]
    assert users == [current, current]  # images and labels


def test_few_free_buffers_are_kept_on_a_cpu() -> None:
    to_cpu = devices.ToCpu((2, 2, 3))
    batches = [to_cpu.take(4) for _ in range(20)]
    assert not to_cpu._free
    batches.clear()
    assert len(to_cpu._free) == devices.MAX_FREE
