"""Shapes of well-known models, for benchmarks with dummy weights and for planning. No weights, no tokenizers.

The figures are those of the published config.json files; `hybridgen serve opt-13b --load-format dummy` uses one.
"""

from pathlib import Path

from hybridgen.configs.settings import EMBEDDED_MODEL

_FOLDER = Path(__file__).resolve().parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names that `preset_folder` knows, sorted."""
    return tuple(sorted(path.name for path in _FOLDER.iterdir() if (path / "config.json").is_file()))


def preset_folder(name: str) -> Path | None:
    """The folder with the config.json of a preset; None if there is none of that name."""
    return _FOLDER / name if name in preset_names() else None


def tokenizer_source(model: str) -> str:
    """Where to look for the tokenizer of `model`: with itself, or, since a preset has none and its weights are random
    anyway, with the embedded model, whose ids every preset's vocabulary contains."""
    return model if preset_folder(model) is None or Path(model).is_dir() else str(EMBEDDED_MODEL)
