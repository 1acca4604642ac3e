"""The devices: CUDA's logic on stand-ins for its events, the CPU's clock, and the limits of either."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device, limits
from benchmarks.device import MIB, CpuDevice, CudaDevice, open_device
from benchmarks.harness import interleave
from benchmarks.limits import DATASHEET, SAME, Roofline, roofline_of
from benchmarks.options import BenchError
from minipeft_kernels.lab.roofline import GPUS


@pytest.fixture
def stream(monkeypatch):
    """A stand-in for CUDA: a stream that does what is queued only when it is waited for."""
    queue, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing
            self.at = None

        def record(self):
            queue.append(lambda: setattr(self, "at", clock[0]))

        def elapsed_time(self, end):
            assert self.at is not None and end.at is not None, "read before it was waited for"
            return 1e3 * (end.at - self.at)

    def synchronize(_=None):
        while queue:
            queue.pop(0)()

    def take(seconds):
        queue.append(lambda: clock.__setitem__(0, clock[0] + seconds))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=300 * MIB))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: take(500.0))
    # The buffer itself would need a GPU.
    monkeypatch.setattr(torch, "empty", lambda size, **_: SimpleNamespace(size=size, zero_=lambda: take(1000.0)))
    return take


def test_cuda_times_what_the_stream_did_between_two_events(stream):
    gpu = CudaDevice()
    times = interleave([lambda: stream(1.0), lambda: stream(2.5)], gpu, rounds=3)
    assert times == [[1.0] * 3, [2.5] * 3]


def test_cuda_waits_until_the_slowest_call_is_queued(stream, monkeypatch):
    gpu = CudaDevice()
    clock = iter(range(0, 1000, 2))  # every call takes two seconds of the host's
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: float(next(clock)) / 100)
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    interleave([lambda: None], gpu, seconds=0.01)
    assert slept[-1] == int(1.5 * 0.02 * 2e9) and len(set(slept)) == 1
    gpu.expect(60.0)
    assert gpu.head_start == int(1.5 * 0.5 * 2e9), "a call that waits for the GPU itself"
    gpu.expect(0.0)
    assert gpu.head_start == device.LEAST_HEAD_START


def test_cuda_empties_twice_the_cache(stream):
    assert CudaDevice()._buffer.size * 4 == 600 * MIB


@pytest.mark.parametrize(("threads", "clock"), [(1, "CPU time"), (2, "wall")])
def test_waiting_counts_only_where_threads_wait_for_each_other(threads, clock, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cpu = CpuDevice(flush_bytes=1024)
    cpu.flush()
    start = cpu.mark()
    time.sleep(0.2)
    waited = cpu.seconds(start, cpu.mark())
    assert cpu.clock.startswith(clock) and (waited < 0.1 if threads == 1 else waited >= 0.2)
    start = cpu.mark()
    assert sum(range(10**6)) > 0 and cpu.seconds(start, cpu.mark()) > 0


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device(None, quick=True).torch_device.type == "cpu"
    with pytest.raises(BenchError, match="sees no CUDA GPU"):
        open_device("cuda")
    with pytest.raises(BenchError, match="cpu or cuda, got 'tpu'"):
        open_device("tpu")


def test_cache_sizes_are_read_where_linux_gives_them():
    assert device.last_level_cache() >= 0
    assert device._bounded(1, 5) == 5 and device._bounded(1 << 40, 5) == device.MAX_CPU_FLUSH


def test_a_known_gpu_has_its_makers_limits():
    gpu = SimpleNamespace(torch_device=torch.device("cuda"))
    limits = roofline_of(gpu, "NVIDIA A100-SXM4-80GB")
    assert limits.bandwidth == 2039e9 and limits.flops_of(torch.bfloat16) == 312e12
    assert "data sheet" in limits.source


def test_names_of_gpus_are_those_of_the_kernels_table():
    assert set(SAME.values()) <= {gpu.name for gpu in GPUS}
    assert set(SAME) <= set(DATASHEET)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "Unheard-of GPU", "AMD EPYC"])
def test_any_other_device_is_measured(name):
    limits = roofline_of(CpuDevice(flush_bytes=0), name, quick=True)
    assert limits.bandwidth > 0 and not limits.flops and "measured" in limits.source
    assert limits.flops_of(torch.float32) == limits.flops[torch.float32] > 0


def test_a_limit_is_the_best_of_several(monkeypatch):
    from fake_device import FakeDevice

    fake = FakeDevice()
    run = fake.call("copy", 9.0, 5.0, 4.0, 2.0, 7.0)
    assert limits._best(fake, run) == 2.0


def test_a_limit_only_rises():
    found = iter([3.0, 1.0, 4.0])
    limits = Roofline(2.0, "measured", {torch.float32: 2.0}, lambda _: next(found) * 10, lambda: next(found))
    limits.measure_again()
    assert limits.bandwidth == 3.0 and limits.flops == {torch.float32: 10.0}
    given = Roofline(2.0, "given", {torch.float32: 2.0})
    given.measure_again()
    assert given.bandwidth == 2.0 and given.flops == {torch.float32: 2.0}


def test_the_longer_of_moving_and_computing_is_the_floor():
    limits = Roofline(10.0, "given", {torch.float32: 100.0})
    assert limits.floor_seconds(20, 100, torch.float32) == 2.0
    assert limits.floor_seconds(20, 500, torch.float32) == 5.0
