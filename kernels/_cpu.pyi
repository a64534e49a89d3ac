from collections.abc import Sequence

def supported_isas() -> list[str]: ...

class Pool:
    def __init__(self, cpus: Sequence[int], isa: str) -> None: ...
    @property
    def num_threads(self) -> int: ...
    def close(self) -> None: ...

class Step:
    def __init__(
        self,
        pool: Pool,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
        k_pages: int,
        v_pages: int,
        num_pages: int,
        num_seqs: int,
        query_begin: int,
        kv_len: int,
        block_table: int,
        max_pages: int,
        num_heads: int,
        scale: float,
        /,
    ) -> None: ...
    def store(self, layer: int, k: int, k_stride: int, v: int, v_stride: int, /) -> None: ...
    def attend(
        self,
        layer: int,
        q: int,
        q_stride: int,
        out: int,
        out_stride: int,
        out_float32: bool,
        lse: int,
        sliding_window: int,
        soft_cap: float,
        /,
    ) -> None: ...

class Rows:
    def __init__(self, isa: str, dtype: str) -> None: ...
    def rms_norm(
        self,
        pool: Pool | None,
        rows: int,
        n: int,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        weight: int,
        eps: float,
        out: int,
        out_stride: int,
    ) -> None: ...
    def rotary(
        self,
        pool: Pool | None,
        rows: int,
        half: int,
        q: int,
        q_stride: int,
        num_heads: int,
        k: int,
        k_stride: int,
        num_kv_heads: int,
        head_dim: int,
        cos: int,
        sin: int,
    ) -> None: ...
    def silu_and_mul(
        self, pool: Pool | None, rows: int, n: int, x: int, x_stride: int, out: int, out_stride: int
    ) -> None: ...
