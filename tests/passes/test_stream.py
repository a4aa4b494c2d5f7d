"""The stream: every batch arrives complete and in order, one is on its way while one is in use, and nothing is kept."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

from qbench.errors import PointError
from qbench.passes.stream import Stream, fetching

CPU = torch.device("cpu")
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[gpu, needs_cuda])]


def tensors(generator):
    """Of several dtypes and layouts, smaller and larger than a chunk of 256 bytes, and not multiples of one."""
    wide = torch.randn(37, 50, generator=generator)
    return [
        [wide, wide.bfloat16()],
        [wide.double().T, wide[:, ::3], torch.arange(999)],
        [torch.tensor(1.5), torch.empty(0, 4), torch.randn(64, generator=generator) > 0],
        [],
        [torch.randn(3, 5, 7, generator=generator).half()],
    ]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_bit_for_bit_in_order(device, depth, generator):
    given = tensors(generator)
    expected = [[tensor.clone() for tensor in batch] for batch in given]
    with Stream(torch.device(device), depth, chunk_bytes=256, chunks=2) as stream:
        arrived = list(stream.ahead(given))
    assert [[id(tensor) for tensor in batch] for batch in arrived] == [[id(t) for t in batch] for batch in given]
    for batch, wanted in zip(arrived, expected, strict=True):
        for tensor, right in zip(batch, wanted, strict=True):
            assert (tensor.device.type, tensor.dtype) == (device, right.dtype)
            assert torch.equal(tensor.cpu(), right)


def test_a_parameter_moves_with_its_modules_and_a_view_moves_alone():
    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.weight = one.weight
    before = one.weight.data_ptr()
    with Stream(CPU) as stream:
        list(stream.ahead([[one.weight.detach()]]))
        assert one.weight.data_ptr() == before
        list(stream.ahead([list(one.parameters()), list(other.parameters())]))
    assert other.weight is one.weight
    assert one.weight.data_ptr() != before


@pytest.mark.parametrize("depth", [1, 2])
def test_one_batch_is_on_its_way_while_one_is_in_use(depth):
    asked = []

    def batches():
        for i in range(5):
            asked.append(i)
            yield [torch.full((8,), float(i))]

    with Stream(CPU, depth) as stream:
        for i, [tensor] in enumerate(stream.ahead(batches())):
            assert asked == list(range(min(5, i + 1 + depth)))
            assert tensor.tolist() == [i] * 8


def test_the_next_batch_travels_while_the_caller_is_busy():
    release = threading.Event()

    class Watched(Stream):
        def _copy(self, pairs):
            if pairs[0][0][0] == 1:
                release.wait(10)
            return super()._copy(pairs)

    with Watched(CPU) as stream:
        arrivals = stream.ahead([[torch.zeros(1)], [torch.ones(1)]])
        next(arrivals)  # returns although the second one is not through
        release.set()
        assert next(arrivals)[0].item() == 1


def test_streams_within_a_stream_share_it():
    with Stream(CPU, chunk_bytes=64) as stream:
        outer = stream.ahead([[torch.full((100,), float(i))] for i in range(4)])
        for i in range(4):
            assert next(outer)[0].unique().tolist() == [i]
            inner = stream.ahead([torch.full((100,), 10.0 * i + j)] for j in range(3))
            assert [batch[0].unique().item() for batch in inner] == [10 * i, 10 * i + 1, 10 * i + 2]


@pytest.mark.parametrize("offloaded", [False, True])
def test_nothing_of_a_batch_outlives_its_turn(offloaded):
    tensors, hosts = [], []

    def batch(i):
        array = np.zeros(1000, np.float32)
        tensor = torch.from_numpy(array)
        tensors.append(weakref.ref(tensor))
        hosts.append(weakref.ref(array))  # dies with the tensor's memory
        return [tensor]

    with fetching(CPU, offloaded) as fetch:
        arrivals = fetch(map(batch, range(6)))
        for i in range(6):
            used = next(arrivals)
            coming = [i + 1] if offloaded and i < 5 else []
            assert alive(hosts, ([] if offloaded else [i]) + coming)
            del used
            assert alive(tensors, coming)


def alive(references, expected):
    """Whether just those are alive; the thread may take a moment to forget what it has copied."""
    deadline = time.monotonic() + 10
    while [i for i, held in enumerate(references) if held() is not None] != expected:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def test_what_is_not_offloaded_is_handed_over_as_it_is():
    batch = [torch.zeros(3)]
    pointer = batch[0].data_ptr()
    with fetching(CPU, False) as fetch:
        assert next(fetch([batch])) is batch
    assert batch[0].data_ptr() == pointer


def test_a_device_that_is_full_is_said_in_one_sentence():
    huge = torch.zeros(1).expand(2**50)
    with (
        Stream(CPU) as stream,
        pytest.raises(PointError, match=r"the next weights, 4503599627\.4 MB, cannot be .* cpu"),
    ):
        list(stream.ahead([[torch.zeros(1)], [huge]]))


def test_a_copy_that_fails_reaches_the_caller():
    class Broken(Stream):
        def _copy(self, pairs):
            raise RuntimeError("the bus is gone\nand more")

    with (
        Broken(CPU) as stream,
        pytest.raises(PointError, match=r" 0\.0 MB, cannot be .* to cpu: the bus is gone$"),
    ):
        list(stream.ahead([[torch.zeros(1)]]))


def test_the_thread_ends_with_the_stream_whatever_happens():
    def leave_early():
        with Stream(CPU) as stream:
            for _ in stream.ahead([torch.zeros(10)] for _ in range(3)):
                raise KeyError

    with pytest.raises(KeyError):
        leave_early()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qbench-stream")]


@gpu
@needs_cuda
def test_memory_is_never_overwritten_while_it_is_read():
    """Each batch is read by slow kernels that are still queued when the next ones are started and it is given back."""
    count, size = 200, 1 << 20
    sums = torch.zeros(count, device="cuda", dtype=torch.float64)
    with Stream(torch.device("cuda"), chunk_bytes=1 << 20) as stream:
        batches = ([torch.full((size,), float(i))] for i in range(count))
        for i, [tensor] in enumerate(stream.ahead(batches)):
            torch.cuda._sleep(1_000_000)
            sums[i] = tensor.double().sum()
            del tensor
    assert sums.tolist() == [float(i) * size for i in range(count)]


# Overlap is seen in the order of events, which a GPU that is shared with other processes does not change: what is
# awaited takes milliseconds, and the kernel that must still be running then takes two seconds and more.
SPIN_CYCLES = 4_000_000_000


@gpu
@needs_cuda
def test_weights_travel_while_kernels_run():
    release = threading.Event()

    class Held(Stream):
        def _copy(self, pairs):
            if pairs[0][0][0] == 1:
                release.wait(60)
            return super()._copy(pairs)

    # larger than the ring, so that its first chunks have to come back from the GPU before its last ones leave
    weights = [torch.full((128 << 20,), i, dtype=torch.uint8) for i in range(2)]
    with Held(torch.device("cuda")) as stream:
        arrivals = stream.ahead([weight] for weight in weights)
        next(arrivals)
        torch.cuda._sleep(SPIN_CYCLES)
        computed = torch.cuda.current_stream().record_event()
        release.set()  # the kernel is queued before the first byte leaves
        [arrived] = next(arrivals)
        stream._stream.record_event().synchronize()
        assert not computed.query()
        assert bool((arrived == 1).all())


@gpu
@needs_cuda
def test_kernels_run_while_weights_travel():
    x = torch.randn(1024, 1024, device="cuda")
    y = x @ x  # loads the kernel, which would wait for those that run

    def batches():
        yield [torch.zeros(1 << 20)]
        with torch.cuda.stream(stream._stream):
            torch.cuda._sleep(SPIN_CYCLES)  # keeps the second batch from arriving
        yield [torch.ones(1 << 20)]

    with Stream(torch.device("cuda")) as stream:
        arrivals = stream.ahead(batches())
        next(arrivals)
        held_up = stream._stream.record_event()
        torch.mm(x, x, out=y)
        torch.cuda.current_stream().synchronize()  # as the harness does after each group
        assert not held_up.query()
        assert bool((next(arrivals)[0] == 1).all())
