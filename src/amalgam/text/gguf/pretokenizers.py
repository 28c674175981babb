"""How byte-level BPE cuts text into words: what `tokenizer.ggml.pre` names.

In: a name. Out: expressions for the tokenizers library, and what goes with them. A name stands for a published
tokenizer.json: where its expressions are known they are taken, and llama.cpp's own, written for std::regex, only where
they are not. The two differ in few texts; the tests list them.
Must never know: metadata, tokens, files.

Each expression cuts what the ones before it left whole, and its matches stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
_REST_AND_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_PUNCTUATED = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_KANJI_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_KANJI_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with case, in the ranges of deepseek-llm's tokenizer.json.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASIAN_SCRIPTS = (
    "\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff"
)
_NO_HAN = r"&&[^\p{Han}]]"
_NOT_SENTENCE_MARKS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_REST}"
_GPT4 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_GPT4O = _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + rf"|\p{{N}}{{1,3}}|{_REST_AND_SLASHES}"
_DEEPSEEK3 = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES_AND_SPACES}"
_LINES = r"[^\n]+|[\n]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text becomes words, before byte-pair merges within each.

    Attributes:
        expressions: one after the other.
        normalizes: text is brought into Unicode's form NFC first.
        ignores_merges: a word that is a token is that token, whatever the merges say.
        adds_bos: unless the file says otherwise.
        is_byte_level: words are spelled in letters that stand for bytes. Otherwise spaces are ▁, as in SentencePiece,
            and a character that is no token is spelled `<0x0A>`.
    """

    expressions: tuple[str, ...]
    normalizes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False
    is_byte_level: bool = True


def _split_by(*expressions: str, **settings: bool) -> PreTokenizer:
    return PreTokenizer(expressions, **settings)


_LLAMA3 = _split_by(_GPT4, ignores_merges=True, adds_bos=True)
_DIGITS_ALONE = _split_by(r"\p{N}", _GPT2)
_DEEPSEEK_V3 = _split_by(r"\p{N}{1,3}", _KANJI_AND_KANA, _DEEPSEEK3)
_PIECES = _split_by(_LINES, is_byte_level=False)
_BAILING = _split_by(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_COHERE2 = _split_by(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O, normalizes=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
        _split_by(_GPT2),
    ),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4"), _split_by(_GPT2)),
    **dict.fromkeys(("jais", "trillion", "granite-docling"), _split_by(_GPT2)),
    **dict.fromkeys(("olmo", "mpt", "modern-bert"), _split_by(_GPT2, normalizes=True)),  # GPT-NeoX's
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_ALONE),
    "command-r": _split_by(r"\p{N}", _GPT2, normalizes=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "f2llmv2"), _split_by(_QWEN2, normalizes=True)),
    **dict.fromkeys(("kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), _split_by(_QWEN2)),
    "ufakzeka": _split_by(rf"{_WORD}|\p{{N}}|{_REST}"),
    "laguna": _split_by(_LINES, _QWEN2),
    "qwen35": _split_by(
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        rf"|{_LINES_AND_SPACES}",
        normalizes=True,
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("lfm2", "jina-v5-nano"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _split_by(_GPT4)),
    **dict.fromkeys(("glm4", "glm5"), _split_by(_GPT4, ignores_merges=True)),
    "jais-2": _split_by(
        rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
        + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
        + r"|\s{1,2}(?!\S)|\s{1}"
    ),
    "minicpm5": _split_by(r"\p{N}{1,3}", rf"{_ENDINGS}|{_WORD}|\p{{N}}+|{_REST}", ignores_merges=True),
    "seed-coder": _split_by(rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES_AND_SPACES}"),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "exaone-moe": _split_by(
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _split_by(_GPT4O)),
    "granite-embed-multi-97m": _split_by(_GPT4O, ignores_merges=True),
    "tekken": _split_by(_CASED % ("", "") + rf"|\p{{N}}|{_REST_AND_SLASHES}", ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _COHERE2),
    "kimi-k2": _split_by(
        r"[\p{Han}]+|"
        + _CASED.replace(_UPPER, _UPPER[:-1] + _NO_HAN).replace(_LOWER, _LOWER[:-1] + _NO_HAN)
        % (f"{_ENDINGS}?", f"{_ENDINGS}?")
        + rf"|\p{{N}}{{1,3}}|{_REST}"
    ),
    "youtu": _split_by(
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + rf"|\p{{N}}|{_REST_AND_SLASHES}",
        ignores_merges=True,
    ),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _DEEPSEEK_V3),
    "spark2_5": _split_by(
        r"\p{N}{1,3}",
        _KANJI_AND_KANA,
        rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "deepseek-llm": _split_by(
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _KANJI_AND_HANGUL,
        r"\p{N}+",
    ),
    "deepseek-coder": _split_by(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _KANJI_AND_HANGUL, r"\p{N}"),
    "afmoe": _split_by(
        # Digits in threes from the right; first in runs whose length is a multiple of three, for the sake of long ones.
        r"\p{N}{1,510}(?=(?>\p{N}{510})*(?!\p{N}))",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
        f"[{_ASIAN_SCRIPTS}]+",
        _DEEPSEEK3,
    ),
    "superbpe": _split_by(r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "falcon": _split_by(r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _split_by(_NOT_SENTENCE_MARKS)),
    "viking": _split_by(_NOT_SENTENCE_MARKS, r"\p{N}"),
    "chameleon": _split_by(
        r"<sentinel:[0-9]+>",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
        adds_bos=True,
    ),
    **dict.fromkeys(
        ("gemma4", "granite-embed-multi-311m"), PreTokenizer((_LINES,), adds_bos=True, is_byte_level=False)
    ),
    "sarvam-moe": _PIECES,
}
