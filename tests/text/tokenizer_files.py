"""Tokenizers of the kinds that are published, in small, and text in many scripts to compare them by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, USER = "<|begin|>", "<|end|>", "<|user|>"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN2 = (rf"{_WORDS}|\p{{N}}|{_REST}",)
LLAMA3 = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PROBES = (
    "hello world",
    " how are  you",
    "It's 12345 o'clock\n\ndef main():\n    return x  # naïve\n",
    "café déjà vu",
    "cafe\u0301 de\u0301ja\u0300 vu, \u212b \ufb01ne \u00bd \u2167",
    "你好，世界。明月几时有？龘靐",
    "ひらがなカタカナ漢字",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "한국어 \u1112\u1161\u11ab\u1100\u116e\u11a8",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301 😀",
    "tabs\t\tand\r\nlines\r\rhere\n\n\n   end   ",
    "a\u00a0b\u3000c\u200bd",
    "WE'LL DON'T HTTPServer straße ẞ ǅ ʰa",
    "1234567890.123,456",
    f"{USER}hi {EOS} there{BOS}",
    "▁ literal ▁▁",
    "x<0x0A>y",
    "   ",
    "\n",
    "",
)
TEXTS = {
    "english": "It was the best of times, it was the worst of times; she said: 'I can't.'\n\n  Indented.",
    "chinese": "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。龘靐齉爩鱻麤",
    "emoji": "ok 😀👩‍👩‍👧‍👦 e\u0301 🇨🇭 done",
    "python": "def f(x: int) -> str:\n\treturn f'{x!r:>{10}}'  # naïve\n",
    "replacement": "a genuine \ufffd stays, and \ufffd\ufffd",
    "special": "one<|im_end|>two<|endoftext|> three",
}
_CORPUS = [
    "hello world, how are you doing today? I'm fine. 12345 don't WON'T it's\n\n  def main():\n    return 0\n",
    "café naïve déjà vu 你好 世界 明月几时有 привет мир مرحبا بالعالم " * 3,
] * 20


def byte_level(splits: tuple[str, ...], *, normalizer: Any = None, bos: bool = True) -> Tokenizer:
    """As Llama 3, Qwen and DeepSeek publish them: words cut by expressions, then merges of bytes."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, [BOS, EOS], initial_alphabet=alphabet, vocab_size=600)
    tokenizer.add_special_tokens([USER])
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def sentence_piece(scheme: str) -> Tokenizer:
    """BPE over text with ▁ for spaces, and bytes for what has no piece.

    Args:
        scheme: where one more space is put in front: `prepend` as a normalizer does it, before the text and after each
            special token (Llama 2, Mixtral); `first` or `never` as the pre-tokenizer `Metaspace` does it.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokenizer, ["<unk>", BOS, EOS, *spelled], vocab_size=700)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in spelled]
    tokenizer = Tokenizer.from_str(json.dumps({**data, "pre_tokenizer": None}))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if scheme == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([USER])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def spelled_bytes() -> Tokenizer:
    """Pieces with ▁ for spaces and bytes for what has no piece, as Llama 2 and Mixtral publish them; few merges."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip],
    )
    return tokenizer


def publish(folder: Path, tokenizer: Tokenizer, model_type: str = "llama", **config: Any) -> Path:
    """Write a folder's files as a publisher does; `config` is tokenizer_config.json's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1000}))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def _train(tokenizer: Tokenizer, special_tokens: list[str], **settings: Any) -> None:
    trainer = trainers.BpeTrainer(special_tokens=special_tokens, show_progress=False, **settings)
    tokenizer.train_from_iterator(_CORPUS, trainer)
