from collections.abc import Iterator

import pytest
import torch

from hybridgen.kernels.isa import supported_isas
from hybridgen.kernels.pool import AttentionPool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session", params=supported_isas())
def pool(request: pytest.FixtureRequest) -> Iterator[AttentionPool]:
    """Two threads on each instruction set that this machine has."""
    with AttentionPool(2, isa=request.param) as pool:
        yield pool


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
