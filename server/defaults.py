"""The sampling that a model's makers recommend (generation_config.json) for what a request leaves open."""

from pathlib import Path

import msgspec

from hybridgen.configs.settings import Settings
from hybridgen.engine.request import InvalidRequest, SamplingParams, check_sampling_params


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of generation_config.json that sampling knows; the neutral value where it has none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class DefaultsError(Exception):
    """The file cannot be used; the text names it and the field."""


def load_sampling_defaults(settings: Settings) -> SamplingDefaults:
    """Read from the model's folder, or the cache where the engine has put it; neutral without a file.

    Raises:
        DefaultsError: --generation-config names a folder without the file, the file is no JSON, or a field has
            the wrong type or is out of range.
    """
    path = _generation_config(settings)
    if path is None:
        return SamplingDefaults()
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        known = {
            name: fields[name] for name in SamplingDefaults.__struct_fields__ if fields.get(name) is not None
        }
        defaults = msgspec.convert(known, SamplingDefaults)
        check_sampling_params(SamplingParams(**msgspec.structs.asdict(defaults)), vocab_size=1)
    except (OSError, msgspec.DecodeError, InvalidRequest) as error:
        raise DefaultsError(f"{path}: {error}") from error
    return defaults


def _generation_config(settings: Settings) -> Path | None:
    if settings.generation_config == "vllm":
        return None
    folder = Path(settings.model).expanduser()
    if settings.generation_config != "auto":
        folder = Path(settings.generation_config).expanduser()
        if not (folder / "generation_config.json").is_file():
            raise DefaultsError(f"--generation-config {folder}: holds no generation_config.json")
    if folder.is_dir():
        path = folder / "generation_config.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # it takes a while, and a folder does without

    cached = try_to_load_from_cache(
        settings.model,
        "generation_config.json",
        cache_dir=settings.download_dir,
        revision=settings.revision,
    )
    return Path(cached) if isinstance(cached, str) else None
