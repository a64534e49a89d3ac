from collections.abc import Sequence

def supported_isas() -> list[str]: ...
def set_policy(address: int, bytes: int, mode: int, nodes: Sequence[int]) -> int: ...
def move_pages(addresses: int, count: int, nodes: int, status: int) -> tuple[int, int]: ...
def advise(address: int, bytes: int, advice: int) -> int: ...
def lock_on_fault(address: int, bytes: int) -> int: ...
def unlock(address: int, bytes: int) -> int: ...
def chase(address: int, bytes: int, num_reads: int) -> float: ...

class Stats:
    @property
    def num_layers(self) -> int: ...
    @property
    def bytes(self) -> list[int]: ...
    @property
    def items(self) -> list[int]: ...
    @property
    def busy_ns(self) -> list[int]: ...
    @property
    def waiting_ns(self) -> list[int]: ...
    @property
    def blocked_ns(self) -> list[int]: ...

class Pool:
    def __init__(self, cpus: Sequence[int], groups: Sequence[int], isa: str) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    def leave_caller_alone(self) -> None: ...
    def close(self) -> None: ...
    def read(self, data: int, bytes: int) -> int: ...
    def stats(self) -> Stats: ...
    def reset_stats(self) -> None: ...
    def start_trace(self, max_events: int) -> None: ...
    def stop_trace(self) -> list[tuple[int, int, str, int, int, int, int]]: ...

class PageMemory:
    def __init__(
        self,
        num_pages: int,
        labels: int,
        heat: int,
        bandwidths: Sequence[float],
        latencies: Sequence[float],
        /,
    ) -> None: ...
    def set_speed(self, node: int, bandwidth: float, latency_s: float, /) -> None: ...
    def take(self) -> tuple[list[int], list[int]]: ...

class Step:
    def __init__(
        self,
        pool: Pool,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
        page_stride: int,
        k_pages: int,
        v_pages: int,
        first_page: int,
        num_pages: int,
        total_pages: int,
        num_seqs: int,
        query_begin: int,
        kv_len: int,
        block_table: int,
        max_pages: int,
        num_heads: int,
        scale: float,
        /,
    ) -> None: ...
    def keep_index(
        self, isa: str, index: int, index_stride: int, v_sum: int, v_sum_stride: int, /
    ) -> None: ...
    def keep_memory(self, memory: PageMemory, /) -> None: ...
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
    def submit(
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
    ) -> Attend: ...

class Attend:
    def wait(self) -> None: ...
    def is_done(self) -> bool: ...
    def ended_ns(self) -> int: ...

class LinearWeights:
    def __init__(self, weight: int, bias: int, inputs: int, outputs: int) -> None: ...

def linear(
    pool: Pool, weights: LinearWeights, x: int, x_stride: int, out: int, out_stride: int, rows: int
) -> None: ...
def has_linear(isa: str, /) -> bool: ...

class Layer:
    def __init__(
        self,
        attention_norm: int,
        qkv: LinearWeights,
        q_norm: int,
        k_norm: int,
        out: LinearWeights,
        mlp_norm: int,
        up: LinearWeights,
        down: LinearWeights,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None: ...
    def enter(
        self, pool: Pool, rows: int, x: int, residual: int, cos: int, sin: int, half: int, heads: int
    ) -> None: ...
    def leave(self, pool: Pool, rows: int, attended: int, residual: int, x: int) -> None: ...

def copy_pages(
    pool: Pool,
    source_k: int,
    source_v: int,
    target_k: int,
    target_v: int,
    sources: Sequence[int],
    targets: Sequence[int],
    half_bytes: int,
    source_stride: int,
    target_stride: int,
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
    def merge(
        self,
        pool: Pool | None,
        rows: int,
        n: int,
        out_a: int,
        lse_a: int,
        out_b: int,
        lse_b: int,
        out: int,
        lse: int,
    ) -> None: ...

def index_group_bytes(head_dim: int) -> int: ...

class IndexPages:
    def __init__(
        self,
        dtype: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        page_stride: int,
        index: int,
        index_stride: int,
        v_sum: int,
        v_sum_stride: int,
    ) -> None: ...
    def build(self, pool: Pool, isa: str, k: int, v: int, pages: Sequence[int]) -> None: ...
    def estimate(
        self,
        isa: str,
        q: int,
        group: int,
        scale: float,
        soft_cap: float,
        layer_head: int,
        block_table: Sequence[int],
        num_tokens: int,
        out: int,
    ) -> None: ...
    def select(
        self,
        isa: str,
        q: int,
        group: int,
        scale: float,
        soft_cap: float,
        layer_head: int,
        block_table: Sequence[int],
        num_tokens: int,
        num_sinks: int,
        always_begin: int,
        mass: float,
    ) -> tuple[bool, list[int], list[float], list[float]]: ...

class MassRecord:
    def __init__(self, num_layers: int) -> None: ...
    def read(self) -> list[tuple[int, float, float, int, int, int, int, int, int]]: ...

class MassStep:
    def __init__(
        self,
        step: Step,
        isa: str,
        mass: float,
        floor: float,
        tail: bool,
        num_sinks: int,
        min_tokens: int,
        record: MassRecord,
    ) -> None: ...
    @property
    def num_scanned(self) -> int: ...
    @property
    def scanned_rows(self) -> list[int]: ...
    def submit(
        self,
        layer: int,
        q: int,
        q_stride: int,
        out: int,
        out_stride: int,
        lse: int,
        soft_cap: float,
        foretelling: MassForetelling | None,
    ) -> MassAttend: ...
    def foretell(self, layer: int, q: int, q_stride: int, soft_cap: float) -> MassForetelling: ...

class MassForetelling:
    def is_done(self) -> bool: ...

class MassAttend:
    def wait(self) -> None: ...
    def is_done(self) -> bool: ...
    def ended_ns(self) -> int: ...

class TopKRecord:
    def __init__(self, num_layers: int) -> None: ...
    def read(self) -> list[tuple[int, float, float, int, int]]: ...
    def read_busy_ns(self) -> int: ...

class HybridGenStep:
    def __init__(self, step: Step, ratio: float, min_tokens: int, record: TopKRecord) -> None: ...
    @property
    def rows(self) -> list[int]: ...
    @property
    def is_settled(self) -> bool: ...
    def submit(
        self,
        layer: int,
        q: int,
        q_stride: int,
        out: int,
        out_stride: int,
        lse: int,
        soft_cap: float,
        scored: bool,
        others: bool,
    ) -> HybridGenAttend: ...

class HybridGenAttend:
    def wait(self) -> None: ...
    def is_done(self) -> bool: ...
    def ended_ns(self) -> int: ...
