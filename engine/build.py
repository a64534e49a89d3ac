"""From EngineSettings to a loaded EngineCore: the one place where the engine's parts are put together."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.balance import Balance
from hybridgen.engine.core import EngineCore
from hybridgen.engine.host_memory import FIRST_EMULATED_ID, PATTERNS, HostMemory, page_shape
from hybridgen.engine.kv_store import (
    KVStore,
    available_host_bytes,
    choose_max_model_len,
    choose_num_host_pages,
    kv_layout,
)
from hybridgen.engine.machine import describe_memory, memory_nodes
from hybridgen.engine.model import Decoder
from hybridgen.engine.model_spec import UnsupportedModel, spec_from_config
from hybridgen.engine.request import Ready
from hybridgen.engine.runner import ModelRunner
from hybridgen.engine.sampler import Sampler
from hybridgen.engine.weights import WeightError, dummy_weights, load_weights, resolve_model
from hybridgen.kernels.layout import KVLayout
from hybridgen.kernels.memory import PlacementForbidden, check_placement
from hybridgen.kernels.numa import allowed_nodes
from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MassPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.feedback import FeedbackConfig, FeedbackController, Mode
from hybridgen.scheduler.machine import Device, Machine, MemoryNode, Tier
from hybridgen.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


def build_engine(settings: EngineSettings) -> EngineCore:
    """Load the model and allocate its KV pages.

    Raises:
        WeightError, UnsupportedModel: the checkpoint cannot be read, or is of a kind that is not supported.
        NotEnoughMemory, ValueError: the settings do not fit the machine or the model.
    """
    started = time.perf_counter()
    # Linear layers are the device's, whatever stands for it.
    torch.set_num_threads(settings.device_threads or settings.threads)
    device = torch.device(settings.device)
    folder = resolve_model(settings.model, revision=settings.revision, download_dir=settings.download_dir)
    config = load_config(folder)
    spec = spec_from_config(config)
    dtype = choose_dtype(settings.dtype, config, device)
    layout = kv_layout(spec, settings.page_size, dtype)
    # Rotary positions have no table that ends, but beyond max_position_embeddings the model was never trained.
    wanted_len = settings.max_model_len or spec.max_positions
    policy = make_policy(settings, spec.num_layers)
    num_device_pages = settings.num_device_pages
    num_host_pages = choose_num_host_pages(
        layout,
        num_device_pages=num_device_pages,
        num_host_pages=settings.num_host_pages,
        with_index=policy.needs_index,
        cache_bytes=settings.kv_cache_memory_bytes,
        useful_tokens=wanted_len * settings.max_num_seqs,
        available_bytes=available_host_bytes() - spec.num_parameters() * dtype.itemsize,
    )
    max_model_len = choose_max_model_len(
        layout,
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        num_sink_pages=settings.num_sink_pages,
        asked=settings.max_model_len,
        model_limit=spec.max_positions,
    )
    if settings.load_format == "dummy":
        weights = dummy_weights(spec, dtype=dtype, device=device, seed=settings.seed)
    else:
        weights = load_weights(folder, spec, dtype=dtype, device=device, show_progress=True)
    pool, device_pool = make_pools(settings)
    if settings.device_threads and settings.feedback != "fixed" and settings.device_share != 0.5:
        logger.warning("--device-share has no effect without --feedback fixed")
    nodes, is_confined = host_nodes(settings, num_host_pages, layout, with_index=policy.needs_index)
    host = HostMemory(
        layout,
        num_host_pages,
        nodes,
        with_index=policy.needs_index,
        rule=settings.placement,
        policy=settings.host_attention,
        migration_bytes=settings.migration_bytes,
        is_confined=is_confined,
    )
    decoder = Decoder(
        spec, weights, max_model_len=max_model_len, pool=device_pool or pool, layer_ahead=settings.layer_ahead
    )
    store = KVStore(
        spec,
        layout,
        num_device_pages=num_device_pages,
        host=host,
        pool=pool,
        policy=policy,
        device_pool=device_pool,
    )
    num_pages = num_device_pages + num_host_pages
    eos_token_ids = find_eos_token_ids(folder, config)
    ready = Ready(
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        page_size=settings.page_size,
        num_pages=num_pages,
        num_device_pages=num_device_pages,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=spec.num_parameters(),
        load_seconds=time.perf_counter() - started,
    )
    logger.info(
        "%s: %s, %.1f M parameters in %s, context %d; %d device and %d host KV pages of %d tokens (%.2f GiB); "
        "%d threads; %.1f s",
        folder,
        spec.family,
        ready.num_parameters / 1e6,
        ready.dtype,
        max_model_len,
        num_device_pages,
        num_host_pages,
        settings.page_size,
        num_pages * layout.page_bytes / 2**30,
        settings.threads,
        ready.load_seconds,
    )
    scheduler = Scheduler(
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        num_sink_pages=settings.num_sink_pages,
        page_size=settings.page_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    return EngineCore(
        runner=ModelRunner(decoder, store, device),
        scheduler=scheduler,
        balance=None if device_pool is None else make_balance(settings, scheduler, store, layout, pool),
        sampler=Sampler(spec.vocab_size, eos_token_ids=eos_token_ids, device=device),
        ready=ready,
        eos_token_ids=eos_token_ids,
        seed=settings.seed,
    )


def make_pools(settings: EngineSettings) -> tuple[AttentionPool, AttentionPool | None]:
    """The host's threads, and those that stand for a device beside it, if there are any: each on cores of its own.

    Raises:
        ValueError: there are not enough cores for both, or no device pages for the second.
    """
    if not settings.device_threads:
        defaults = EngineSettings(model="")
        for flag, name in (
            ("--feedback", "feedback"),
            ("--device-share", "device_share"),
            ("--target-step-s", "target_step_s"),
        ):
            if getattr(settings, name) != getattr(defaults, name):
                logger.warning(
                    "%s has no effect: the same threads attend device and host pages; give the device some of its own "
                    "with --device-threads, beside --device-pages",
                    flag,
                )
        return AttentionPool(num_threads=settings.threads), None
    if not settings.num_device_pages:
        raise ValueError("--device-threads is for device pages, of which there are none: give --device-pages")
    cpus = AttentionPool.default_cpus()
    if settings.device_threads >= len(cpus):
        raise ValueError(
            f"--device-threads {settings.device_threads} leaves the host none of this process's {len(cpus)} cores"
        )
    num_host = min(settings.threads, len(cpus) - settings.device_threads)
    device_pool = AttentionPool(cpus=cpus[: settings.device_threads])
    host_cpus = cpus[settings.device_threads : settings.device_threads + num_host]
    return AttentionPool(cpus=host_cpus, is_apart=True), device_pool


def host_nodes(
    settings: EngineSettings, num_host_pages: int, layout: KVLayout, *, with_index: bool
) -> tuple[tuple[MemoryNode, ...], bool]:
    """The memory nodes that host pages may lie on, DRAM first, then emulated ones; and whether pages must be kept off
    other nodes.

    Where there is only one, and none is emulated, nothing of it is measured: there is nothing to choose.

    Raises:
        ValueError: no node may hold pages, or none can be emulated.
    """
    topology, _ = describe_memory(settings.memory_tiers, measured=False)
    if not topology.usable:
        raise ValueError(
            "no memory node may hold KV: --memory-tiers takes them all out; see hybridgen topology"
        )
    first, several = topology.usable[0], len(topology.usable) > 1
    is_confined = not several and len(allowed_nodes()) > 1
    if several or is_confined:
        try:
            check_placement()
        except PlacementForbidden as error:
            logger.warning("%s. Host pages lie where the system puts them", error)
            several = is_confined = False
    wanted = sum(page_shape(layout, with_index=with_index).role_bytes) * num_host_pages
    room = first.free_bytes + first.cached_bytes if is_confined else wanted
    only = MemoryNode(first.id, f"{first.tier}{first.id}", Tier(first.tier), 1.0, 0.0, room)
    if not several and not settings.emulate_node:
        return (only,), is_confined
    topology, measurements = describe_memory(settings.memory_tiers, measured=True)
    nodes = list(memory_nodes(topology, measurements))
    if not nodes and settings.emulate_node:
        raise ValueError(
            "no memory node's speed is known, so that none can be emulated; see hybridgen topology"
        )
    if not nodes:
        logger.warning("no memory node's speed is known: host pages lie where the system puts them")
        return (only,), False
    if not several:
        nodes = nodes[:1]
        if not is_confined:
            nodes[0] = replace(nodes[0], capacity_bytes=max(nodes[0].capacity_bytes, wanted))
    real = {node.name: position for position, node in enumerate(nodes)}
    for number, node in enumerate(settings.emulate_node):
        if node.name in real:
            # A node that there is, made slower: emulated from now on, whatever it was.
            position = real[node.name]
            capacity = nodes[position].capacity_bytes if node.capacity_bytes is None else node.capacity_bytes
            nodes[position] = replace(
                nodes[position],
                read_bandwidth=node.bandwidth,
                latency_s=node.latency_s,
                capacity_bytes=capacity,
                emulated=True,
            )
            logger.info("%s is emulated: read at no more than %.1f GB/s", node.name, node.bandwidth / 1e9)
            continue
        logger.info(
            "%s is emulated: DRAM of %s, read at no more than %.1f GB/s, %.0f ns later",
            node.name,
            nodes[0].name,
            node.bandwidth / 1e9,
            1e9 * node.latency_s,
        )
        nodes.append(
            MemoryNode(
                FIRST_EMULATED_ID + number,
                node.name,
                Tier.CXL,
                read_bandwidth=node.bandwidth,
                latency_s=node.latency_s,
                capacity_bytes=wanted if node.capacity_bytes is None else node.capacity_bytes,
                emulated=True,
            )
        )
    return tuple(nodes), is_confined


def make_balance(
    settings: EngineSettings, scheduler: Scheduler, store: KVStore, layout: KVLayout, pool: AttentionPool
) -> Balance:
    """The controller of the split between device and host."""
    _, measurements = describe_memory(settings.memory_tiers, measured=True)
    per_core = [item.read_bandwidth[0][1] for item in measurements.nodes if item.read_bandwidth]
    rate = per_core[0] if per_core else 10e9
    nodes = store.host.nodes
    # One node's description has no figures where nothing was to be placed.
    num_threads = pool.num_threads - 1  # less the device's, which the pool counts as its caller
    host_nodes = tuple(
        replace(node, read_bandwidth=rate * num_threads) if node.read_bandwidth <= 1 else node
        for node in nodes
    )
    device = MemoryNode(
        -1,
        "device",
        Tier.DEVICE,
        rate * settings.device_threads,
        0.0,
        layout.page_bytes * settings.num_device_pages,
    )
    pattern = PATTERNS[settings.host_attention]
    shape = page_shape(layout, with_index=store.host.pages.index is not None)
    expected = sum(size * share for size, share in zip(shape.role_bytes, pattern.shares, strict=True))
    mass = settings.host_attention == "mass"
    floor = settings.attention_mass_floor
    config = FeedbackConfig(
        machine=Machine(
            "this machine",
            Device("threads that stand for a device", device, link_bandwidth=rate / 2, matmul_flops=1e12),
            host_nodes,
            num_threads,
            core_flops=1e11,
            source="measured",
        ),
        device_page_bytes=layout.page_bytes,
        host_page_read_bytes=max(1.0, expected),
        num_device_pages=settings.num_device_pages,
        max_threads=num_threads,
        max_num_seqs=settings.max_num_seqs,
        mode=Mode(settings.feedback),
        min_device_pages=settings.num_sink_pages + 1,
        fixed_share=settings.device_share,
        can_look_ahead=settings.layer_ahead,
        can_set_threads=False,
        mass_floor=(floor if floor is not None else 1 - 2 * (1 - settings.attention_mass)) if mass else None,
        target_step_s=settings.target_step_s,
    )
    return Balance(
        FeedbackController(config),
        scheduler,
        page_bytes=layout.page_bytes,
        node_ids=tuple(node.id for node in nodes),
        num_threads=num_threads,
    )


def make_policy(settings: EngineSettings, num_layers: int) -> Policy:
    """What reads the host pages.

    Raises:
        ValueError: the floor exceeds the mass, or nothing looks ahead.
    """
    if settings.layer_ahead and settings.host_attention == "exact":
        raise ValueError("--layer-ahead is of no use to --host-attention exact: choose mass or hybridgen")
    if settings.host_attention == "exact":
        return ExactPolicy()
    if settings.host_attention == "hybridgen":
        return HybridGenPolicy(
            num_layers,
            ratio=settings.hybridgen_ratio,
            adapt=settings.hybridgen_adapt,
            interval=settings.hybridgen_feedback_interval,
        )
    return MassPolicy(
        num_layers,
        mass=settings.attention_mass,
        floor=settings.attention_mass_floor,
        tail=settings.attention_tail,
    )


def load_config(folder: Path) -> PreTrainedConfig:
    """The checkpoint's config.json.

    Raises:
        WeightError: it cannot be read.
        UnsupportedModel: transformers does not know its model_type.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (KeyError, ValueError) as error:
        raise UnsupportedModel(f"{folder / 'config.json'}: {error}") from error
    except OSError as error:
        raise WeightError(f"cannot read {folder / 'config.json'}: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def choose_dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype by name; "auto" is the checkpoint's own, except that float16 becomes bfloat16 on a CPU,
    where float16 matrix products are slow."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype), name
        return dtype
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.bfloat16 if own == torch.float16 and device.type == "cpu" else own


def find_eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens that end a text: generation_config.json's and config.json's together."""
    found: set[int] = set()
    sources: list[object] = [config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    for ids in sources:
        if isinstance(ids, int):
            found.add(ids)
        elif isinstance(ids, list):
            found.update(ids)
    return tuple(sorted(found))
