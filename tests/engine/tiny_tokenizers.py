"""Tokenizers of every kind that models bring, built in a test and saved to a folder as a model has them."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "the cat sat on the mat and the dog sat on the log",
    "naïve café, déjà vu; Straße; el niño",
    "привет мир, как дела",
    "你好。世界。今天天气很好",
    "emoji 🙂 and family 👨‍👩‍👧 and flag 🇫🇷",
    "  two spaces\n\tand a tab {json: [1, 2, 3]}",
)
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "a", "b", "c", "é", "你", "s", "t", " ", ".", "END", "EN"]


def byte_level() -> RawTokenizer:
    """Llama 3, Qwen, OPT: GPT-2's alphabet of bytes."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def llama() -> RawTokenizer:
    """Llama 2, Mistral: sentencepiece BPE with byte fallback, converted."""
    pieces = ["<unk>", *_byte_tokens(), "▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS if word != " ")]
    tokenizer = RawTokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> RawTokenizer:
    """Sentencepiece unigram with byte fallback."""
    pieces = ["<unk>", *_byte_tokens(), "▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS if word != " ")]
    tokenizer = RawTokenizer(
        models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], 0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def metaspace_without_bytes() -> RawTokenizer:
    pieces = ["<unk>", "▁", *WORDS, *(f"▁{word}" for word in WORDS if word != " ")]
    tokenizer = RawTokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> RawTokenizer:
    """No causal model here has one: it stands for decoders that are not known to work on bytes."""
    pieces = [
        "[UNK]",
        *(word for word in WORDS if word.isalpha()),
        *(f"##{word}" for word in WORDS if word.isalpha()),
    ]
    tokenizer = RawTokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS: dict[str, Callable[[], RawTokenizer]] = {
    "byte_level": byte_level,
    "llama": llama,
    "metaspace": metaspace,
    "metaspace_without_bytes": metaspace_without_bytes,
    "wordpiece": wordpiece,
}


def save(folder: Path, kind: str, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """With special tokens `<s>` and `</s>` and an added token `<tool é>` that is not special."""
    raw = KINDS[kind]()
    raw.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer
