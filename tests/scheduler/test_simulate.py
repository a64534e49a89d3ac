from collections.abc import Mapping
from dataclasses import replace

import pytest

from hybridgen.configs.machines import read_machine
from hybridgen.scheduler.cost import (
    CORES,
    DEVICE_BANDWIDTH,
    DEVICE_COMPUTE,
    FIXED,
    LINK,
    Chunk,
    CostFactors,
    CostModel,
    ModelShape,
    Part,
    StepWork,
    System,
    in_turn,
    node_bandwidth,
    side_by_side,
    work,
)
from hybridgen.scheduler.describe import machine_of
from hybridgen.scheduler.machine import Device, Machine, MemoryNode, Role, Tier
from hybridgen.scheduler.placements import ROLES
from hybridgen.scheduler.simulate import (
    CAPACITY,
    DoesNotFit,
    Limits,
    SimulationResult,
    Workload,
    find_capacity,
    percentile,
    simulate,
)

DRAM = MemoryNode(0, "dram", Tier.DRAM, 1e5, 1e-7, 1 << 20)
DEVICE = Device("device", MemoryNode(-1, "device", Tier.DEVICE, 1e6, 1e-6, 1 << 20), 1e4, 1e6)
TINY_MACHINE = Machine("tiny", DEVICE, (DRAM,), num_cores=2, core_flops=1e6, source="a test")
# 32 bytes of K and V a token and layer; 1000 parameters a layer.
TINY = ModelShape("tiny", 2, 16, 2, 1, 8, parameters=3000, linear_parameters=2000, head_parameters=500)
PLAIN = CostFactors(
    step_s=2e-3, layer_s=0.5e-3, sequence_s=0.25e-3, handover_s=1e-3, scan_share=1.0, gather_share=0.5,
    core_fixed_share=0.0, selected_share=0.25, v_sums_share=0.0,
)  # fmt: skip
ON_ONE_NODE: Mapping[Role, tuple[float, ...]] = dict.fromkeys(ROLES, (1.0,))
LLAMA = ModelShape("8b", 32, 4096, 32, 8, 128, 8_030_261_248, 6_979_321_856, 525_336_576)
HOST_SYSTEMS = (System.EXACT, System.MASS, System.HYBRIDGEN, System.HYBRIDGEN_PUBLISHED, System.CPU_EXACT)
FETCHING_SYSTEMS = (System.STREAM, System.STREAM_INT4, System.H2O, System.INFINIGEN)


def decode(*, device: int = 0, scanned: int = 0, short: int = 0, sequences: int = 1) -> StepWork:
    return StepWork(
        num_decodes=sequences,
        num_host_decodes=sequences if scanned + short else 0,
        device_tokens=device,
        scanned_tokens=scanned,
        short_tokens=short,
        host_shares=ON_ONE_NODE,
        num_sampled=sequences,
    )


def tiny(system: System, machine: Machine = TINY_MACHINE, factors: CostFactors = PLAIN) -> CostModel:
    return CostModel(machine, TINY, factors, system)


def llama(system: System, *, num_cxl: int = 0, name: str = "h100") -> CostModel:
    return CostModel(machine_of(read_machine(name), num_cxl=num_cxl), LLAMA, CostFactors(), system)


def faster_nodes(machine: Machine, factor: float) -> Machine:
    nodes = tuple(replace(node, read_bandwidth=node.read_bandwidth * factor) for node in machine.nodes)
    return replace(machine, nodes=nodes)


# -- cost of a step --


def test_an_exact_step_costs_what_is_added_up_by_hand() -> None:
    linear = 2e-3  # 2000 bytes at 1 MB/s, and 2000 operations at 1 Mflop/s
    device = 100 * 32 / 1e6
    host = 200 * 32 / 1e5  # the cores need a tenth of it: 200 * 4 * 16 operations at 2 Mflop/s
    there, back, handover = 2 * 8 * 2 / 1e4, 2 * (8 + 1) * 4 / 1e4, 1e-3
    layer = linear + max(device, there + handover + host + back) + 0.5e-3
    head, fixed = 1e-3, 2e-3 + 0.25e-3
    cost = tiny(System.EXACT).step(decode(device=100, short=200))
    assert cost.total.seconds == pytest.approx(2 * layer + head + fixed)
    assert cost.device_s == pytest.approx(2 * device)
    assert cost.host_s == pytest.approx(2 * (there + handover + host + back))
    assert cost.node_bytes == (200 * 64,)
    assert cost.device_bytes == 100 * 64


def test_a_streamed_step_costs_what_is_added_up_by_hand() -> None:
    copies = 200 * 32 / 1e4
    device = 2e-3 + (100 + 2 * 200) * 32 / 1e6  # what is fetched is written there and read again
    cost = tiny(System.STREAM).step(decode(device=100, short=200))
    assert copies > device
    assert cost.total.seconds == pytest.approx(2 * (copies + 0.5e-3) + 1e-3 + 2.25e-3)
    assert cost.link_bytes == 200 * 64


def test_looking_ahead_hides_the_shorter_of_host_and_device() -> None:
    load = decode(device=5000, scanned=2000)
    ahead = tiny(System.MASS).step(load).total.seconds
    not_ahead = tiny(System.MASS).step(replace(load, layer_ahead=False)).total.seconds
    assert ahead < not_ahead


def test_without_host_pages_there_is_no_hand_over() -> None:
    for system in HOST_SYSTEMS:
        total = tiny(system).step(decode(device=100)).total
        assert LINK not in total.busy
        assert total.critical[FIXED] == pytest.approx(2 * 0.5e-3 + 2.25e-3)


@pytest.mark.parametrize(
    ("system", "load", "machine", "limit"),
    [
        (System.EXACT, decode(device=10_000), TINY_MACHINE, DEVICE_BANDWIDTH),
        (System.EXACT, decode(sequences=50), TINY_MACHINE, DEVICE_COMPUTE),
        (System.EXACT, decode(short=5000), TINY_MACHINE, node_bandwidth("dram")),
        (System.EXACT, decode(short=5000), faster_nodes(TINY_MACHINE, 100), CORES),
        (System.STREAM, decode(short=5000), TINY_MACHINE, LINK),
        (System.STREAM, decode(short=5000), faster_nodes(TINY_MACHINE, 0.01), node_bandwidth("dram")),
        (System.EXACT, decode(), faster_nodes(TINY_MACHINE, 1), DEVICE_BANDWIDTH),
    ],
)  # fmt: skip
def test_the_limit_is_the_resource_that_is_the_slowest(
    system: System, load: StepWork, machine: Machine, limit: str
) -> None:
    critical = tiny(system, machine, replace(PLAIN, step_s=0.0, layer_s=0.0)).step(load).total.critical
    # With equal times of products and their bytes either may be named.
    assert max(critical, key=lambda name: critical[name]) in {
        limit,
        DEVICE_COMPUTE if limit == DEVICE_BANDWIDTH else limit,
    }


@pytest.mark.parametrize("system", [*HOST_SYSTEMS, *FETCHING_SYSTEMS])
@pytest.mark.parametrize("tokens", [0, 100, 3000, 100_000])
def test_a_critical_path_is_as_long_as_the_step_and_nothing_is_busier(system: System, tokens: int) -> None:
    total = tiny(system).step(decode(device=300, scanned=tokens)).total
    assert sum(total.critical.values()) == pytest.approx(total.seconds)
    # Work on the device is bytes and operations at the same time; no single resource works longer than the step.
    assert all(seconds <= total.seconds * (1 + 1e-9) for seconds in total.busy.values())


@pytest.mark.parametrize("system", [*HOST_SYSTEMS, *FETCHING_SYSTEMS])
@pytest.mark.parametrize("what", ["nodes", "link", "device", "cores"])
def test_twice_as_fast_hardware_never_makes_a_step_slower(system: System, what: str) -> None:
    device = TINY_MACHINE.device
    assert device is not None
    faster = {
        "nodes": faster_nodes(TINY_MACHINE, 2),
        "link": replace(TINY_MACHINE, device=replace(device, link_bandwidth=2 * device.link_bandwidth)),
        "device": replace(
            TINY_MACHINE, device=replace(device, memory=replace(device.memory, read_bandwidth=2e6))
        ),
        "cores": replace(TINY_MACHINE, core_flops=2e6),
    }[what]
    for tokens in (10, 1000, 30_000):
        load = decode(device=tokens, scanned=tokens, short=tokens)
        assert tiny(system, faster).step(load).total.seconds <= tiny(system).step(load).total.seconds


def test_selecting_reads_the_index_and_a_share_of_the_rows() -> None:
    cost = tiny(System.MASS).step(decode(scanned=1000))
    index = TINY.index_token_bytes
    assert cost.node_bytes == (pytest.approx(1000 * (index + 0.25 * 64)),)


def test_values_of_the_published_scheme_go_over_the_link_for_each_query_head() -> None:
    ours = tiny(System.HYBRIDGEN).step(decode(scanned=1000)).link_bytes
    published = tiny(System.HYBRIDGEN_PUBLISHED).step(decode(scanned=1000)).link_bytes
    queries, partials = 2 * 8 * 2, 2 * 9 * 4
    assert ours == 2 * (queries + partials)
    assert published == pytest.approx(2 * (queries + 50 * 2 * (8 * 2 + 4)))


def test_a_chunk_of_a_prompt_copies_what_lies_on_the_host() -> None:
    load = replace(decode(), num_decodes=0, num_sampled=0, chunks=(Chunk(64, 0, 1000),))
    total = tiny(System.EXACT).step(load).total
    assert total.busy[LINK] == pytest.approx(2 * 1000 * 32 / 1e4)


def test_moves_take_link_time_that_is_free() -> None:
    model, load = tiny(System.EXACT), decode(device=20_000)
    before = model.step(load).total.seconds
    small = model.step(replace(load, moved_bytes=100))
    assert small.total.seconds == before
    assert small.moved_s == 0
    large = model.step(replace(load, moved_bytes=1 << 20))
    assert large.total.seconds == pytest.approx((1 << 20) / 1e4)
    assert large.moved_s == pytest.approx(large.total.seconds - before)


def test_on_cores_everything_is_done_in_turn() -> None:
    cores = replace(TINY_MACHINE, device=None)
    factors = replace(PLAIN, cores_matmul_flops=1e6, linear_share=1.0)
    cost = tiny(System.EXACT, cores, factors).step(decode(device=100, short=200))
    linear = 2000 / 1e5  # weights lie in the same memory
    layer = linear + 300 * 32 / 1e5 + 1e-3 + 0.5e-3
    assert cost.total.seconds == pytest.approx(2 * layer + 1000 / 1e5 + 2.25e-3)


def test_streaming_needs_a_device() -> None:
    with pytest.raises(ValueError, match="no device"):
        tiny(System.STREAM, replace(TINY_MACHINE, device=None))


def test_parts_side_by_side_take_as_long_as_the_longest() -> None:
    both = side_by_side(work("a", 1.0), in_turn(work("b", 2.0), work("a", 0.5)))
    assert both == Part(2.5, {"b": 2.0, "a": 0.5}, {"a": 1.5, "b": 2.0})


# -- simulation --


def run(
    system: System,
    *,
    contexts: tuple[int, ...] = (4096,),
    concurrency: int = 4,
    num_cxl: int = 0,
    seed: int = 0,
) -> SimulationResult:
    workload = Workload(contexts, concurrency=concurrency, num_steps=16, warmup_steps=8, seed=seed)
    return simulate(llama(system, num_cxl=num_cxl, name="rtx5090"), workload)


@pytest.mark.parametrize("system", list(System))
def test_the_same_seed_gives_the_same_result(system: System) -> None:
    assert run(system, contexts=(1000, 2000, 8000)) == run(system, contexts=(1000, 2000, 8000))


def test_another_seed_draws_other_contexts() -> None:
    contexts = (1000, 2000, 8000)
    assert run(System.EXACT, contexts=contexts, seed=1) != run(System.EXACT, contexts=contexts, seed=2)


@pytest.mark.parametrize(
    "system", [System.EXACT, System.MASS, System.HYBRIDGEN, System.CPU_EXACT, System.STREAM]
)
@pytest.mark.parametrize("num_cxl", [0, 2])
def test_what_is_placed_is_what_the_contexts_take(system: System, num_cxl: int) -> None:
    result = run(system, contexts=(30_000,), num_cxl=num_cxl)
    model = llama(system)
    host = {role: sum(roles[role] for roles in result.node_role_bytes.values()) for role in Role}
    assert host[Role.K] == host[Role.V]
    page_bytes = model.device_page_bytes(32)
    num_pages, rest = divmod(result.device_kv_bytes + host[Role.K] + host[Role.V], page_bytes)
    assert rest == 0
    generated = 8 + 16 + 4 + 8  # at most; prompts are computed in turn
    assert 4 * -(-30_000 // 32) <= num_pages <= 4 * -(-(30_000 + generated) // 32)
    with_index = system is System.MASS
    assert (host[Role.INDEX] > 0) == with_index


def test_no_expander_is_the_same_machine() -> None:
    assert run(System.EXACT, num_cxl=0) == simulate(
        CostModel(
            machine_of(read_machine("rtx5090").model_copy(update={"cxl": None})),
            LLAMA,
            CostFactors(),
            System.EXACT,
        ),
        Workload((4096,), concurrency=4, num_steps=16, warmup_steps=8),
    )


@pytest.mark.parametrize("system", HOST_SYSTEMS)
def test_twice_the_host_bandwidth_never_slows_the_engine(system: System) -> None:
    model = llama(system, name="rtx5090")
    workload = Workload((30_000,), concurrency=4, num_steps=16, warmup_steps=64)
    before = simulate(model, workload)
    after = simulate(CostModel(faster_nodes(model.machine, 2), LLAMA, CostFactors(), system), workload)
    # The controller settles on other splits; what it does not find is within its hysteresis.
    assert after.step_p50_s <= before.step_p50_s * 1.02


def test_sequences_that_do_not_fit_wait_and_capacity_is_the_limit() -> None:
    result = run(System.DEVICE_ONLY, contexts=(30_000,), concurrency=8)
    assert result.limit == CAPACITY
    assert result.num_running == result.num_fitting < 8
    assert result.num_waiting == 8 - result.num_fitting


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    large = replace(LLAMA, parameters=70 * 10**9)
    with pytest.raises(DoesNotFit, match=r"130\.4 GiB .*28\.8 GiB"):
        simulate(
            CostModel(llama(System.EXACT, name="rtx5090").machine, large, CostFactors(), System.EXACT),
            Workload((100,), concurrency=1),
        )


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(DoesNotFit, match=r"may reach 200.* tokens"):
        run(System.DEVICE_ONLY, contexts=(200_000,), concurrency=1)


def test_a_device_with_hardly_a_page_is_refused_rather_than_simulated_for_ever() -> None:
    tight = replace(LLAMA, parameters=(27 << 30) // 2 + (650 << 19))
    model = CostModel(llama(System.EXACT, name="rtx5090").machine, tight, CostFactors(), System.EXACT)
    assert 0 < find_capacity(model, Limits()).num_device_pages < 100
    with pytest.raises(DoesNotFit, match="device pages are too few to compute"):
        simulate(model, Workload((8000,), concurrency=16, num_steps=16))


def test_as_many_sequences_fit_as_pages_allow() -> None:
    model = llama(System.EXACT, name="rtx5090")
    capacity = find_capacity(model, Limits())
    device = model.machine.device
    assert device is not None
    room = device.memory.capacity_bytes - LLAMA.weights_bytes - (1 << 30)
    assert capacity.num_device_pages == room // (32 * 128 * 1024)
    assert capacity.num_sequences(32_000, 32, 2) == capacity.num_pages // 1000


def test_the_first_token_comes_after_the_prompt_and_what_was_before_it() -> None:
    model = llama(System.EXACT)
    alone = simulate(model, Workload((16_384,), output_tokens=2, rate=1e-3, num_requests=1))
    cost = model.step(replace(decode(), num_decodes=0, chunks=(Chunk(16_384, 0, 0),)))
    assert alone.ttft_p50_s == pytest.approx(cost.total.seconds)
    crowd = simulate(model, Workload((16_384,), output_tokens=2, rate=1e6, num_requests=4, poisson=False))
    assert crowd.ttft_p99_s == pytest.approx(4 * alone.ttft_p50_s, rel=0.05)


def test_requests_at_a_rate_all_end() -> None:
    workload = Workload((2000, 4000), output_tokens=8, rate=20.0, num_requests=24, seed=3)
    result = simulate(llama(System.MASS), workload)
    assert result.num_waiting == 0
    assert result.device_kv_bytes == result.host_kv_bytes == 0


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.99, 4.0), (0.0, 1.0), (1.0, 4.0)])
def test_percentiles_are_values_that_occurred(share: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == value
    assert percentile([], share) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"contexts": ()},
        {"contexts": (0,)},
        {"contexts": (1,), "concurrency": None},
        {"contexts": (1,), "rate": 1.0},
        {"contexts": (1,), "concurrency": 0},
        {"contexts": (1,), "concurrency": None, "rate": 1.0},
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Workload(**({"concurrency": 1} | wrong))  # type: ignore[arg-type]
