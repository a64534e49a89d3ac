"""Large zeroed tensors in host memory."""

import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def map_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system provides piece by piece as they are written, in huge pages where it grants them.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    # Private: the kernel gives huge pages to shared mappings by another rule, which is mostly "never".
    num_bytes = count * dtype.itemsize + HUGE_PAGE_BYTES
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive; skip to the first huge-page boundary in it.
    whole = torch.frombuffer(region, dtype=torch.uint8)
    skipped = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[skipped : skipped + count * dtype.itemsize].view(dtype).view(shape)
