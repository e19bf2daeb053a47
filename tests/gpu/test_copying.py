"""Many copies in one call of CUDA, and results that a kernel writes to the host: the bytes that were there."""

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from engine.layers.batch import AT_ONCE, MOST_PARTS, Mirror, upload
from engine.worker.copying import batched
from engine.worker.steps.results import written_to_pinned

PAGE = 1 << 16


@pytest.mark.parametrize("way", ["down", "up"])
def test_pages_of_one_call_arrive_where_they_should_and_others_stay(way: str) -> None:
    copy = batched()
    known = tuple(map(int, (torch.version.cuda or "0.0").split("."))) >= (12, 8)
    assert (copy is not None) == known
    if copy is None:
        pytest.skip("this CUDA copies one by one")
    generator = np.random.default_rng(0)
    device = torch.from_numpy(generator.integers(0, 256, (64, PAGE), np.uint8)).cuda()
    host = torch.from_numpy(generator.integers(0, 256, (96, PAGE), np.uint8)).pin_memory()
    pages, slots = generator.permutation(64)[:40], generator.permutation(96)[:40]
    sizes = np.full(40, PAGE, np.uint64)
    sizes[::3] //= 2
    above, below = (each.data_ptr() + at.astype(np.uint64) * PAGE for each, at in ((device, pages), (host, slots)))
    wanted = (host if way == "down" else device).cpu().numpy().copy()
    first, second = (device.cpu().numpy(), host.numpy().copy())
    for page, slot, size in zip(pages, slots, sizes.tolist(), strict=True):
        if way == "down":
            wanted[slot, :size] = first[page, :size]
        else:
            wanted[page, :size] = second[slot, :size]
    stream = torch.cuda.Stream()
    copy(*((below, above) if way == "down" else (above, below)), sizes, stream.cuda_stream)
    stream.synchronize()
    assert np.array_equal((host if way == "down" else device).cpu().numpy(), wanted)


@pytest.mark.parametrize("shape", [(1,), (0, 2), (1, 1), (5, 3), (4097, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool])
def test_what_a_kernel_writes_to_the_host_is_what_the_device_has(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (1000 * torch.randn(shape, device="cuda")).to(dtype)
    for given in (tensor, tensor.mT if tensor.dim() > 1 else tensor.flip(0)):
        found = written_to_pinned(given)
        torch.cuda.current_stream().synchronize()
        assert (found.is_pinned() or not found.numel()) and (found.dtype, found.shape) == (dtype, given.shape)
        assert torch.equal(found, given.cpu())


def test_a_number_that_is_none_arrives_as_such() -> None:
    given = torch.tensor([float("nan"), float("-inf"), -0.0])
    found = written_to_pinned(given.cuda())
    torch.cuda.current_stream().synchronize()
    assert torch.equal(found.view(torch.int32), given.view(torch.int32))


@pytest.mark.parametrize("size", [0, 1, 16_384, AT_ONCE, AT_ONCE + 8, 3 * AT_ONCE - 8, MOST_PARTS * AT_ONCE + 8])
def test_numbers_may_change_once_they_are_sent_though_the_device_comes_to_them_later(size: int) -> None:
    numbers = np.arange(size // 8)
    mirror = Mirror(len(numbers), torch.device("cuda"))
    mirror.host()[:] = numbers
    torch.cuda._sleep(400_000_000)  # 0.2 s
    sent = upload(numbers, torch.device("cuda"))
    mirror.send()
    numbers[:] = mirror.host()[:] = -1
    assert not torch.cuda.current_stream().query(), "the host waited for the device"
    assert torch.equal(sent.cpu(), torch.arange(size // 8)) and torch.equal(sent, mirror.device)


@pytest.mark.parametrize("shape", [(3, 5), (2, AT_ONCE // 8 + 1), (7, 3, 4097)])
def test_numbers_of_any_shape_arrive_in_order(shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(-9, 9, shape, np.int32)
    for given in (numbers, numbers.T.copy(), numbers.astype(np.float32)):
        sent = upload(given, torch.device("cuda"))
        assert np.array_equal(sent.cpu().numpy(), given)
