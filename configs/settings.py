"""Every setting of the daemon, one field each: type, default, bound, unit, help and group.

The only reader of the environment and of the TOML file. `hybridgen serve --help` and docs/settings.md are
generated from the fields: `python -m hybridgen.configs.settings > docs/settings.md`.
"""

import argparse
import difflib
import math
import os
import re
import ssl
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import annotated_types
import msgspec
from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from hybridgen.configs.emulation import EmulatedNode, parse_emulated_node

EMBEDDED_MODEL = Path(__file__).resolve().parent / "embedded"
EMBEDDED_MODEL_NAME = "hybridgen-embedded"  # what clients call it unless --served-model-name says otherwise
ENVIRONMENT_PREFIX = "HYBRIDGEN_"
# Read elsewhere, where no settings object reaches: the C++ extension picks its instruction set by this one.
OTHER_VARIABLES = frozenset({"HYBRIDGEN_CPU_ISA"})

_SUFFIXES = {
    "": 1,
    **{letter: 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)},
    **{letter: 1 << (10 * power) for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)},
    "kB": 1000,
    "B": 1,
    **{f"{letter}iB": 1 << (10 * power) for power, letter in enumerate("KMGT", start=1)},
}


class SettingsError(ValueError):
    """The settings cannot be used; the text names each one, where it came from, and what is allowed."""


def parse_count(value: object) -> object:
    """Turn "32k" (32,000), "32K" (32,768), "4GB" and "4GiB" into numbers, as vLLM reads them.

    Anything that is not a string passes through for the field's own check.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(
            f"not a number; write 32768, 32k (thousands), 32K (1024s), 4GB or 4GiB, got {value!r}"
        )
    count = float(match[1]) * _SUFFIXES[match[2]]
    if count != int(count):
        raise ValueError(f"not a whole number: {value!r}")
    return int(count)


def _parse_length(value: object) -> object:
    if value in ("auto", -1, "-1"):
        return None
    return parse_count(value)


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _parse_names(value: object) -> object:
    """Environment variables hold lists as comma-separated text."""
    return _split(value) if isinstance(value, str) else value


def _parse_memory_tiers(value: object) -> object:
    """ "2=cxl,3=dram", alone or as one of several arguments, to {2: "cxl", 3: "dram"}."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    tiers: dict[int, str] = {}
    for item in (item for text in cast(Sequence[object], value) for item in _split(str(text))):
        match = re.fullmatch(r"(\d+)\s*=\s*(dram|cxl|none)", item)
        if match is None:
            raise ValueError(f"write NODE=dram, NODE=cxl or NODE=none, got {item!r}")
        node = int(match[1])
        if tiers.setdefault(node, match[2]) != match[2]:
            raise ValueError(f"node {node} is named twice: {tiers[node]} and {match[2]}")
    return tiers


def _parse_emulated_nodes(value: object) -> object:
    """Text, or a list of it; in one variable of the environment, nodes are separated by spaces."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    nodes = tuple(
        item if isinstance(item, EmulatedNode) else parse_emulated_node(str(item), parse_count)
        for item in cast(Sequence[object], items)
    )
    names = [node.name for node in nodes]
    if len(set(names)) < len(names):
        raise ValueError(f"emulated nodes need names of their own, got {', '.join(names)}")
    return nodes


MemoryTier = Literal["dram", "cxl", "none"]
EmulatedNodes = Annotated[tuple[EmulatedNode, ...], NoDecode, BeforeValidator(_parse_emulated_nodes)]
PlacementRule = Literal["mapper", "paper", "first-touch", "interleave", "recency"]
Count = Annotated[int, BeforeValidator(parse_count)]
MemoryTiers = Annotated[dict[int, MemoryTier], NoDecode, BeforeValidator(_parse_memory_tiers)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_names)]


def _setting(
    group: str,
    description: str,
    *,
    flags: Sequence[str] = (),
    unit: str = "",
    default_text: str = "",
    metavar: str = "",
    **field: Any,
) -> Any:
    """A pydantic field that also carries what --help and the table say of it.

    Args:
        flags: further spellings besides the one that follows from the field's name.
        default_text: shown for the default, where the value itself would tell a reader nothing.
    """
    extra: dict[str, Any] = {
        "group": group,
        "flags": list(flags),
        "unit": unit,
        "default": default_text,
        "metavar": metavar,
    }
    return Field(description=description, json_schema_extra=extra, **field)


class Settings(BaseSettings):
    """Highest first: the constructor's arguments (the command line), HYBRIDGEN_* variables, the TOML file."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENVIRONMENT_PREFIX,
        env_ignore_empty=True,
        validate_default=False,
    )

    # Model
    model: str = _setting(
        "Model",
        "Folder or Hugging Face id of the model to serve; may also be given without the flag.",
        flags=["--model-path"],
        default=str(EMBEDDED_MODEL),
        default_text="the embedded model",
        min_length=1,
    )
    served_model_name: Names = _setting(
        "Model",
        "Names that clients may call the model by; the first is the one in answers.",
        default_factory=lambda data: (
            EMBEDDED_MODEL_NAME if data.get("model") == str(EMBEDDED_MODEL) else data.get("model", ""),
        ),
        default_text="the model as given",
        metavar="NAME",
        min_length=1,
    )
    tokenizer: str | None = _setting(
        "Model", "Folder or id of the tokenizer.", default=None, default_text="the model's"
    )
    revision: str | None = _setting(
        "Model", "Branch, tag or commit of a Hugging Face id.", default=None, default_text="main"
    )
    download_dir: str | None = _setting(
        "Model",
        "Where downloaded models are kept.",
        default=None,
        default_text="Hugging Face's cache",
        metavar="DIR",
    )
    load_format: Literal["auto", "safetensors", "dummy"] = _setting(
        "Model", "`dummy` fills the weights with random numbers: for measuring speed.", default="auto"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "Model", "Type of weights, activations and KV; `auto` is what the checkpoint names.", default="auto"
    )
    max_model_len: Annotated[int | None, BeforeValidator(_parse_length)] = _setting(
        "Model",
        "Longest prompt and answer together; `auto` is the model's limit, lowered to what the KV pages hold.",
        default=None,
        default_text="auto",
        unit="tokens",
        ge=1,
    )
    chat_template: str | None = _setting(
        "Model",
        "Jinja chat template: a file, or the template itself.",
        default=None,
        default_text="the tokenizer's",
        metavar="TEMPLATE",
    )
    generation_config: str = _setting(
        "Model",
        "Sampling for what requests leave open: `auto` is the model's generation_config.json, `vllm` none of "
        "it, anything else a folder that holds one.",
        default="auto",
        min_length=1,
    )
    seed: int = _setting(
        "Model",
        "Seeds the sampling of requests that bring no seed of their own, and dummy weights.",
        default=0,
        ge=0,
        lt=1 << 63,
    )
    trust_remote_code: bool = _setting(
        "Model", "Refused: code that comes with a checkpoint is never run.", default=False
    )

    # Engine
    device: Literal["auto", "cpu"] = _setting(
        "Engine", "Where the model runs; `auto` is the best this version supports: the CPU.", default="auto"
    )
    tensor_parallel_size: int = _setting(
        "Engine", "Only 1 is supported.", flags=["-tp"], default=1, ge=1, unit="devices"
    )
    threads: int = _setting(
        "Engine",
        "CPU threads that compute; 0 is every CPU this process may use, by affinity and cgroup limit.",
        default=0,
        ge=0,
    )
    max_num_seqs: int = _setting(
        "Engine", "Most sequences in one step; the rest wait.", default=256, ge=1, unit="sequences"
    )
    max_num_batched_tokens: Count = _setting(
        "Engine",
        "Most tokens in one step; longer prompts are computed in chunks.",
        default=2048,
        ge=1,
        unit="tokens",
    )

    # KV cache
    block_size: int = _setting(
        "KV cache",
        "Tokens in a KV page; a multiple of 16.",
        flags=["--page-size"],
        default=32,
        ge=16,
        le=1024,
        multiple_of=16,
        unit="tokens",
    )
    kv_cache_memory_bytes: Count = _setting(
        "KV cache",
        "Memory for KV pages on the host, when their number is not given.",
        default=4 << 30,
        default_text="4GiB",
        gt=0,
        unit="bytes",
    )
    host_pages: int | None = _setting(
        "KV cache",
        "Number of KV pages on the host, instead of --kv-cache-memory-bytes; 0 keeps all on the device.",
        default=None,
        default_text="from --kv-cache-memory-bytes",
        ge=0,
        unit="pages",
    )
    device_pages: int = _setting(
        "KV cache",
        "Number of KV pages on the device. On a CPU this is a part of its memory that stands for one: for trying out "
        "how pages are split.",
        flags=["--num-gpu-blocks-override"],
        default=0,
        ge=0,
        unit="pages",
    )
    sink_pages: int = _setting(
        "KV cache",
        "First pages of each sequence that stay on the device while it runs.",
        default=1,
        ge=0,
        unit="pages",
    )
    host_attention: Literal["exact", "mass", "hybridgen"] = _setting(
        "KV cache",
        "How much of the host pages is read: `exact` all; `mass` an 8-bit index of every token, then only the tokens "
        "that hold most of the softmax mass; `hybridgen` all keys, then the values of a fixed share of tokens, "
        "whatever mass they hold: for comparison.",
        default="exact",
    )
    attention_mass: float = _setting(
        "KV cache",
        "Share of the softmax mass that `mass` attends to, on average over the heads that share keys.",
        default=0.99,
        gt=0,
        lt=1,
    )
    attention_mass_floor: float | None = _setting(
        "KV cache",
        "Share that every head attends to at least: more tokens are read until it does, in the end all.",
        default=None,
        default_text="half as close to 1",
        gt=0,
        lt=1,
    )
    attention_tail: bool = _setting(
        "KV cache",
        "Let `mass` count the tokens that it leaves out with their estimated mass and mean values.",
        default=True,
    )
    hybridgen_ratio: float = _setting(
        "KV cache",
        "Share of a sequence's host tokens that `hybridgen` attends to; at the start, with --hybridgen-adapt.",
        default=0.05,
        gt=0,
        le=1,
    )
    hybridgen_adapt: bool = _setting(
        "KV cache",
        "Let `hybridgen` attend to more tokens, up to half, while the host is not slower than the device, and to "
        "fewer, down to a hundredth, while it is.",
        default=True,
    )
    hybridgen_feedback_interval: int = _setting(
        "KV cache",
        "How often --hybridgen-adapt changes the share.",
        default=4,
        ge=1,
        unit="steps",
    )
    layer_ahead: bool = _setting(
        "KV cache",
        "While a layer is at work, look for the tokens of the next one with queries foretold from its input. `mass` "
        "attends to them with the true queries and looks again where they hold too little; `hybridgen`, as "
        "published, takes the foretold queries for the true ones. Of no use to `exact`.",
        default=False,
    )
    memory_tiers: MemoryTiers = _setting(
        "KV cache",
        "What NUMA nodes are, where `hybridgen topology` takes them for something else: `dram`, `cxl`, or `none` for "
        "memory that is to hold no KV. For example 2=cxl,3=none.",
        default_factory=dict,
        default_text="as detected",
        metavar="NODE=TIER",
    )
    emulate_node: EmulatedNodes = _setting(
        "KV cache",
        "Let a part of DRAM stand for a CXL node, read no faster than this: to watch placement and feedback on a "
        "machine without one. The name of a node that there is slows that one down. Figures of them say that they are "
        "emulated. For example cxl0:bandwidth=4GB,latency=400ns,capacity=2GiB.",
        default=(),
        default_text="none",
        metavar="NAME:bandwidth=BYTES,latency=TIME",
    )
    placement: PlacementRule = _setting(
        "KV cache",
        "Where host pages lie, where there are several memory nodes: `mapper` weighs what is read of each against each "
        "node's bandwidth and moves pages as that changes; `paper` keeps keys in DRAM and values in CXL memory; the "
        "others are what systems do that know nothing of KV.",
        default="mapper",
    )
    migration_bytes: Count = _setting(
        "KV cache",
        "Most to be moved between memory nodes at a time, beside the steps.",
        default=64 << 20,
        default_text="64MiB",
        ge=0,
        unit="bytes",
    )
    device_threads: int = _setting(
        "KV cache",
        "Threads that compute linear layers and attend device pages, so that they stand for a processor beside the "
        "host's; 0: the same threads do it all. Only with --device cpu and --device-pages.",
        default=0,
        ge=0,
    )
    feedback: Literal["measured", "predicted", "fixed"] = _setting(
        "KV cache",
        "How many of a sequence's pages the device keeps: as many as let both sides finish together, by the `measured` "
        "times of steps, or as `predicted` from the machine's description; `fixed` keeps --device-share. Only where "
        "device and host are processors of their own.",
        default="measured",
    )
    device_share: float = _setting(
        "KV cache",
        "Share of a sequence's pages that the device keeps with --feedback fixed.",
        default=0.5,
        ge=0,
        le=1,
    )
    target_step_s: float | None = _setting(
        "KV cache",
        "Admit no further sequence that would make a step longer than this, while the host is the slower side.",
        default=None,
        default_text="no limit",
        gt=0,
        allow_inf_nan=False,
        unit="seconds",
    )
    enable_prefix_caching: bool = _setting(
        "KV cache",
        "Keep the KV of finished requests and reuse it for prompts that begin alike.",
        default=True,
    )

    # Server
    host: str = _setting(
        "Server", "Address to listen on; 0.0.0.0 or :: is every interface.", default="127.0.0.1", min_length=1
    )
    port: int = _setting("Server", "Port to listen on; 0 takes a free one.", default=8000, ge=0, le=65535)
    api_key: Names = _setting(
        "Server",
        "Keys of which a client must send one, as `Authorization: Bearer KEY`.",
        default=(),
        default_text="no key is asked for",
        metavar="KEY",
        repr=False,  # settings are logged
    )
    api_key_file: Path | None = _setting(
        "Server",
        "File of further keys, one a line: unlike an argument, it does not show in a list of processes.",
        default=None,
        default_text="none",
    )
    ssl_certfile: Path | None = _setting(
        "Server",
        "Serve HTTPS with this certificate (PEM); its chain may follow it.",
        default=None,
        default_text="plain HTTP",
    )
    ssl_keyfile: Path | None = _setting(
        "Server",
        "Private key of --ssl-certfile (PEM).",
        default=None,
        default_text="in the certificate's file",
    )
    allowed_origins: Names = _setting(
        "Server",
        "Origins whose web pages may call this server (CORS); `*` is any.",
        default=(),
        default_text="none",
        metavar="ORIGIN",
    )
    max_num_queued_reqs: int = _setting(
        "Server",
        "Most requests that wait for a place in the batch; beyond it the answer is 429.",
        default=1024,
        ge=1,
        unit="requests",
    )
    max_request_bytes: Count = _setting(
        "Server",
        "Largest request body; beyond it the answer is 413.",
        default=32 << 20,
        default_text="32MiB",
        ge=1,
        unit="bytes",
    )
    max_logprobs: int = _setting(
        "Server",
        "Most alternatives per token a request may ask for; -1 is the whole vocabulary.",
        default=20,
        ge=-1,
    )
    sse_keep_alive_interval: float = _setting(
        "Server",
        "Send a comment on a silent stream this often, so that proxies keep it open; 0 is never.",
        default=15.0,
        ge=0,
        allow_inf_nan=False,
        unit="seconds",
    )
    enable_request_id_headers: bool = _setting(
        "Server", "Return each request's id as X-Request-Id.", default=False
    )
    drain_timeout: float = _setting(
        "Server",
        "After SIGTERM, how long running requests may go on before they are aborted.",
        flags=["--shutdown-timeout"],
        default=30.0,
        ge=0,
        allow_inf_nan=False,
        unit="seconds",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "Server", "Least severe messages that are logged.", default="info"
    )
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] | None = _setting(
        "Server",
        "Least severe messages of the HTTP server that are logged.",
        default=None,
        default_text="its access log as --log-level, the rest from `warning`",
    )
    disable_uvicorn_access_log: bool = _setting("Server", "Do not log a line per request.", default=False)
    config: Path | None = _setting(
        "Server",
        "TOML file of settings; its keys are the names of the flags. Flags and environment go before it.",
        default=None,
        default_text="none",
        metavar="FILE",
    )

    @field_validator("device", mode="before")
    @classmethod
    def _refuse_gpus(cls, value: object) -> object:
        if isinstance(value, str) and re.fullmatch(r"(cuda|gpu)(:\d+)?", value):
            raise ValueError(f"{value} is not supported by this version, which computes on the CPU; use cpu")
        return value

    @field_validator("tensor_parallel_size")
    @classmethod
    def _refuse_tensor_parallelism(cls, value: int) -> int:
        if value > 1:
            raise ValueError(f"tensor parallelism is not supported by this version: must be 1, got {value}")
        return value

    @field_validator("trust_remote_code")
    @classmethod
    def _refuse_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "code that comes with a checkpoint is never run; the architecture must be built in"
            )
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _explain_service_links(cls, value: object) -> object:
        # Kubernetes sets HYBRIDGEN_PORT=tcp://10.0.0.1:8000 in every pod beside a Service named hybridgen.
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                f"{value} comes from a Kubernetes Service named hybridgen: set enableServiceLinks: false "
                "in the pod, or --port"
            )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        path = init_settings.init_kwargs.get("config") or os.environ.get(_variable("config"))
        if not path:
            return init_settings, env_settings
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_toml(Path(path)))


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine process needs to know, resolved as far as it can be without loading the model."""

    model: str  # folder or Hugging Face id
    revision: str | None = None
    download_dir: str | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["cpu"] = "cpu"
    max_model_len: int | None = None  # None: the model's own, lowered to what the pages hold
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    page_size: int = 32  # tokens; a multiple of 16
    num_device_pages: int = 0
    num_host_pages: int | None = None  # None: as many as kv_cache_memory_bytes holds
    num_sink_pages: int = 1  # first pages of a sequence that stay on the device
    host_attention: Literal["exact", "mass", "hybridgen"] = "exact"
    attention_mass: float = 0.99
    attention_mass_floor: float | None = None  # None: twice as much may be left out as on average
    attention_tail: bool = True
    hybridgen_ratio: float = 0.05
    hybridgen_adapt: bool = True
    hybridgen_feedback_interval: int = 4  # steps
    layer_ahead: bool = False
    memory_tiers: dict[int, MemoryTier] = {}
    emulate_node: tuple[EmulatedNode, ...] = ()
    placement: PlacementRule = "mapper"
    migration_bytes: int = 64 << 20
    device_threads: int = 0  # 0: the pool attends both tiers
    feedback: Literal["measured", "predicted", "fixed"] = "measured"
    device_share: float = 0.5
    target_step_s: float | None = None
    kv_cache_memory_bytes: int = 4 << 30
    enable_prefix_caching: bool = True
    seed: int = 0
    threads: int = 1
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def engine_settings(settings: Settings) -> EngineSettings:
    """The engine's part of the settings; counts this process's CPUs where `threads` is 0."""
    return EngineSettings(
        model=settings.model,
        revision=settings.revision,
        download_dir=settings.download_dir,
        load_format=settings.load_format,
        dtype=settings.dtype,
        device="cpu",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        page_size=settings.block_size,
        num_device_pages=settings.device_pages,
        num_host_pages=settings.host_pages,
        num_sink_pages=settings.sink_pages,
        host_attention=settings.host_attention,
        attention_mass=settings.attention_mass,
        attention_mass_floor=settings.attention_mass_floor,
        attention_tail=settings.attention_tail,
        hybridgen_ratio=settings.hybridgen_ratio,
        hybridgen_adapt=settings.hybridgen_adapt,
        hybridgen_feedback_interval=settings.hybridgen_feedback_interval,
        layer_ahead=settings.layer_ahead,
        memory_tiers=settings.memory_tiers,
        emulate_node=settings.emulate_node,
        placement=settings.placement,
        migration_bytes=settings.migration_bytes,
        device_threads=settings.device_threads,
        feedback=settings.feedback,
        device_share=settings.device_share,
        target_step_s=settings.target_step_s,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        enable_prefix_caching=settings.enable_prefix_caching,
        seed=settings.seed,
        threads=settings.threads or allowed_cpus(),
        log_level=settings.log_level,
    )


def allowed_cpus() -> int:
    """CPUs that this process may keep busy: its affinity, lowered to its cgroup's quota, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    for quota in cgroup_cpu_quotas():
        allowed = min(allowed, max(1, math.ceil(quota)))
    return allowed


def cgroup_cpu_quotas(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[float]:
    """CPUs granted by each cgroup from this process's own up to the root; those without a limit give nothing."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, inside = line.split(":", 2)
        if number == "0":  # version 2
            top, files = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, files = root / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            top = top if top.is_dir() else root / "cpu"
        else:
            continue
        folder = top / inside.lstrip("/")
        for ancestor in (folder, *folder.parents):
            try:
                quota, period = " ".join((ancestor / file).read_text() for file in files).split()
            except (OSError, ValueError):
                pass
            else:
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
            if ancestor == top:
                break


def api_keys(settings: Settings) -> tuple[str, ...]:
    """The keys of --api-key and --api-key-file together; empty when no key is asked for.

    Raises:
        SettingsError: the file cannot be read, or holds no key, when serving anyone is not what was meant.
    """
    if settings.api_key_file is None:
        return settings.api_key
    try:
        lines = settings.api_key_file.read_text().splitlines()
    except OSError as error:
        raise SettingsError(f"--api-key-file {settings.api_key_file}: {error.strerror}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"--api-key-file {settings.api_key_file}: holds no key")
    return settings.api_key + keys


def client_api_key() -> str | None:
    """The key that `hybridgen chat` and `bench` send unless told another: the first in HYBRIDGEN_API_KEY."""
    return next(iter(_split(os.environ.get(_variable("api_key"), ""))), None)


def chat_template(settings: Settings) -> str | None:
    """The text of --chat-template, read from its file where it names one; None for the tokenizer's own.

    Raises:
        SettingsError: it names a file that cannot be read.
    """
    text = settings.chat_template
    if text is None or "{" in text or "\n" in text:
        return text
    try:
        return Path(text).read_text()
    except OSError as error:
        raise SettingsError(f"--chat-template {text}: {error.strerror}; nor is it a template") from error


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """What --ssl-certfile and --ssl-keyfile hold; None for plain HTTP.

    Raises:
        SettingsError: they cannot be read or do not belong together, or there is a key without a certificate.
    """
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("--ssl-keyfile: it is the key of a certificate; give --ssl-certfile too")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        key = settings.ssl_keyfile or "its own key"
        raise SettingsError(f"--ssl-certfile {settings.ssl_certfile} with {key}: {error}") from error
    return context


def load_settings(arguments: Mapping[str, Any]) -> Settings:
    """The settings from all sources, `arguments` (field name to value) before the rest.

    Raises:
        SettingsError: one line for each setting that cannot be used.
    """
    try:
        return Settings(**arguments)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item, arguments) for item in error.errors())) from None


def unknown_variables() -> tuple[str, ...]:
    """One warning for each HYBRIDGEN_* variable that no setting reads, most likely a misspelling."""
    known = {_variable(name) for name in Settings.model_fields} | OTHER_VARIABLES
    warnings = []
    for variable in sorted(os.environ):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            warnings.append(f"{variable} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    return tuple(warnings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` a flag for every field, by group. Values stay text: the fields check them."""
    parser.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help=Settings.model_fields["model"].description
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        about = _about(field)
        title = about["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            # argparse formats the text with %.
            "help": f"{field.description} {_facts(field)}".replace("%", "%%"),
        }
        kind = _kind(field)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = about["metavar"] or _metavar(name, kind)
        if get_origin(kind) in (tuple, dict):
            options["nargs"] = "+"
        groups[title].add_argument(*flags(name), **options)


def parse_settings(namespace: argparse.Namespace) -> Settings:
    """The settings of a command line that `add_arguments` described, and of the other sources.

    Raises:
        SettingsError: one line for each setting that cannot be used.
    """
    given = vars(namespace)
    arguments = {name: given[name] for name in Settings.model_fields if name in given}
    positional = given.get("model_argument")
    if positional is not None:
        if arguments.get("model", positional) != positional:
            raise SettingsError(f"MODEL {positional} and --model {arguments['model']} differ: give one")
        arguments["model"] = positional
    return load_settings(arguments)


def flags(name: str) -> list[str]:
    """The command-line spellings of a field, the usual one first."""
    return [f"--{name.replace('_', '-')}", *_about(Settings.model_fields[name])["flags"]]


def markdown() -> str:
    """docs/settings.md: every field, by group."""
    lines = [
        "# Settings",
        "",
        "<!-- Generated: python -m hybridgen.configs.settings > docs/settings.md -->",
        "",
        "`hybridgen serve` takes each setting from the first place that has it: the command line, the",
        "environment, the TOML file named by `--config` or `HYBRIDGEN_CONFIG`, the default. A flag",
        "`--max-num-seqs 64` is `HYBRIDGEN_MAX_NUM_SEQS=64` in the environment (lists separated by commas)",
        "and `max-num-seqs = 64` in the file. An unknown flag or key ends the program; an unknown",
        "`HYBRIDGEN_*` variable is warned about.",
        "",
        "Counts and sizes may carry a suffix: `32k` is 32,000 and `32K` 32,768; `4GB` is 4·10⁹ bytes and",
        "`4GiB` 4·2³⁰.",
    ]
    previous = ""
    for name, field in Settings.model_fields.items():
        group = _about(field)["group"]
        if group != previous:
            heading = ["", f"## {group}", "", "| flag | value | default | meaning |", "|---|---|---|---|"]
            lines.extend(heading)
            previous = group
        spellings = ", ".join(f"`{flag}`" for flag in flags(name))
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| {spellings} | {_values(field)} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _read_toml(path: Path) -> dict[str, object]:
    """The file's keys as field names; dashes, and the other spellings of a flag, are accepted."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    spellings = {flag.lstrip("-"): name for name in Settings.model_fields for flag in flags(name)}
    values: dict[str, object] = {}
    for key, value in content.items():
        name = spellings.get(key.replace("_", "-"), key)
        if name in values:
            raise SettingsError(f"--config {path}: {name} is set twice")
        if name == "config":
            raise SettingsError(f"--config {path}: a file cannot name another")
        values[name] = value
    return values


def _explain(error: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the setting as its source spells it, and what is allowed."""
    name = str(error["loc"][0])
    if name not in Settings.model_fields:
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        return f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "")
    if name in arguments:
        source = flags(name)[0]
    elif os.environ.get(_variable(name)):
        source = _variable(name)
    else:
        source = f"{name} in the configuration file"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{source}: {message}"
    return f"{source}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def _about(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _kind(field: FieldInfo) -> Any:
    """The field's type without None."""
    alternatives = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    if type(None) in get_args(field.annotation):
        return alternatives[0]
    return field.annotation


def _metavar(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return {int: "N", float: "S", Path: "FILE"}.get(kind, name.upper())


def _values(field: FieldInfo) -> str:
    """What may be given: the type in words, its unit and its bounds."""
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind is bool:
        return "on, off"
    if get_origin(kind) in (tuple, dict):
        return "one or more"
    words = {int: "number", float: "number", str: "text", Path: "file"}[kind]
    bounds = []
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            bounds.append(f"≥ {rule.ge}")
        elif isinstance(rule, annotated_types.Gt):
            bounds.append(f"> {rule.gt}")
        elif isinstance(rule, annotated_types.Le):
            bounds.append(f"≤ {rule.le}")
    return ", ".join([_about(field)["unit"] or words, *bounds])


def _default(field: FieldInfo) -> str:
    if text := _about(field)["default"]:
        return str(text)
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _facts(field: FieldInfo) -> str:
    unit = _about(field)["unit"]
    return f"({unit}; default: {_default(field)})" if unit else f"(default: {_default(field)})"


if __name__ == "__main__":
    print(markdown(), end="")
