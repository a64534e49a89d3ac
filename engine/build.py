"""From EngineSettings to a loaded EngineCore: the one place where the engine's parts are put together."""

import logging
import time
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.core import EngineCore
from hybridgen.engine.kv_store import (
    KVStore,
    available_host_bytes,
    choose_max_model_len,
    choose_num_host_pages,
    kv_layout,
)
from hybridgen.engine.model import Decoder
from hybridgen.engine.model_spec import UnsupportedModel, spec_from_config
from hybridgen.engine.request import Ready
from hybridgen.engine.runner import ModelRunner
from hybridgen.engine.sampler import Sampler
from hybridgen.engine.weights import WeightError, dummy_weights, load_weights, resolve_model
from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MassPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


def build_engine(settings: EngineSettings) -> EngineCore:
    """Load the model and allocate its KV pages.

    Raises:
        WeightError, UnsupportedModel: the checkpoint cannot be read, or is of a kind that is not supported.
        NotEnoughMemory, ValueError: the settings do not fit the machine or the model.
    """
    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
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
    pool = AttentionPool(num_threads=settings.threads)
    decoder = Decoder(spec, weights, max_model_len=max_model_len, pool=pool, layer_ahead=settings.layer_ahead)
    store = KVStore(
        spec,
        layout,
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        pool=pool,
        policy=policy,
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
    return EngineCore(
        runner=ModelRunner(decoder, store, device),
        scheduler=Scheduler(
            num_device_pages=num_device_pages,
            num_host_pages=num_host_pages,
            num_sink_pages=settings.num_sink_pages,
            page_size=settings.page_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=settings.enable_prefix_caching,
        ),
        sampler=Sampler(spec.vocab_size, eos_token_ids=eos_token_ids, device=device),
        ready=ready,
        eos_token_ids=eos_token_ids,
        seed=settings.seed,
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
