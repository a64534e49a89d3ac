"""The long-context check, on a context that is long for its device only."""

from pathlib import Path

import pytest

from bench.long_context import PAGE_SIZE, serve, status_bytes, write_model


def test_a_few_device_pages_give_the_tokens_of_none(tmp_path: Path) -> None:
    write_model(tmp_path, 1100)
    whole = serve(tmp_path, num_tokens=1000, num_new=8, num_device_pages=0, chunk=256)
    split = serve(tmp_path, num_tokens=1000, num_new=8, num_device_pages=3, chunk=256)
    assert len(whole["tokens"]) == 8
    assert split["tokens"] == whole["tokens"]
    assert (whole["demoted_pages"], split["demoted_pages"]) == (0, 1008 // PAGE_SIZE + 1 - 3)
    assert split["host_tokens_attended"] > 4 * split["device_tokens_attended"]


@pytest.mark.parametrize("field", ["VmRSS", "VmHWM"])
def test_sizes_are_bytes(field: str) -> None:
    assert 10 << 20 < status_bytes(field) < 1 << 40
