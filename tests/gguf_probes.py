"""A made-up vocabulary and texts in many scripts, to compare tokenizers of GGUF files with llama.cpp's.

`python -m tests.gguf_probes` writes `data/gguf_tokens.json` with what llama.cpp makes of them; it needs the package
`llama-cpp-python` (0.3.36 was used). The tests only read that file.
"""

from __future__ import annotations

import json
import random
import tempfile
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from amalgam.text.gguf.pretokenizers import PRE_TOKENIZERS

DATA = Path(__file__).parent / "data" / "gguf_tokens.json"
TEXTS = (
    "It's 1234567 I'LL we'Re DON'T o'clock \u2019s don't\n\n\n  x = [1, 22, 333];\r\n\tif (a_b!=c):  # done.\n",
    "HTTPServer camelCase XMLHttpRequest iPhone15 naïve ÉCOLE straße ǅungla ʰa İstanbul'da",
    "Cafe\u0301 e\u0301le\u0300ve A\u030angstro\u0308m d\u0300 ﬁne ½ ¼ Ⅷ x² H₂O 1½ ①②",
    "明月几时有？把酒问青天。2024年12月31日，共1,234,567元。こんにちは、カタカナ。한국어 텍스트입니다! ㄱㄴ ㄅㄆ",
    "Привет, мир! Γειά σου Κόσμε; שלום עולם مرحبا، بالعالم۔ 1٢٣٤ हिन्दी में लिखा।  ไทยแลนด์ ภาษา ລາວ ខ្មែរ မြန်မာ",
    "😀👩‍👩‍👧‍👦🇨🇭 👍🏽 ok→no ≠ ∑∞ €3,14 $5.00 £7 50% a+b<c>=d^2~|`x`| © ™ °C",
    "   three spaces\t\ttabs \t mixed \n \n  end   \u00a0nbsp\u3000ideographic\u2003em   ",
    "a/b//c\\d http://www.example.com/path?q=1&r=2#frag foo@bar.com ...!!!???---/*\n*/ //\n\n// x\r\n\r\n",
    "1 12 123 1234 12345 123456 1234567 0x1F 3.14159 1e10 a1b22c333d4444 99bottles v2.0.1",
    "_under_score_ __init__ 'quoted' \"double\" (paren) [brack] {brace} <tag/> </tag> #hash !bang ,comma",
    "<sentinel:12> IMGIMGABCZ x    y  z\n\t\n" + " " * 13 + "x" + " " * 5 + "\n" + " " * 9 + "y\n" + " " * 20,
    "zero\u200bwidth soft\u00adhyphen \ufeffbom \u2028line\u2029para \ue000private \U000e0001tag",
    "a b c d e f  g — “quotes” ‘single’ … –dash «guillemets» ¿Qué? ¡Olé!",
)
SPECIAL = ("<s>", "</s>", "<unk>")
# Tokens that no merges lead to: a tokenizer that ignores merges finds them.
WHOLE = ("HTTPServer", " mixed", "1234567", " 12", "camelCase", " x", "明月几时有")
# Vocabularies of special tokens, `(text, type)`, and the ids that the metadata name, for the ends of an answer.
_TEXTS_OF_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>"),
    *("<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
    *("<reponame>", "<|file_sep|>", "<|fim_prefix|>", "<|im_start|>", "<|channel|>", "<|start|>", "<unused0>"),
)
ENDS: dict[str, tuple[list[tuple[str, int]], dict[str, int]]] = {
    **{text: ([(text, 3), ("<other>", 3)], {"eos": 1}) for text in _TEXTS_OF_ENDS},
    "user-defined": ([("<|im_end|>", 4), ("<|end|>", 4), ("<x>", 3)], {"eos": 2}),
    "typed as a word, unmistakable": ([("<|im_end|>", 1), ("<|eot_id|>", 1), ("<x>", 3)], {"eos": 2}),
    "named, by no known text": ([("<a>", 3), ("<b>", 3), ("<c>", 3), ("<d>", 3)], {"eos": 0, "eot": 1, "eom": 2}),
    "named for code": ([("<a>", 3), ("<b>", 3), ("<c>", 3), ("<d>", 3)], {"eos": 3, "fim_pad": 0, "fim_rep": 1}),
    "named for code, others by text": ([("<a>", 3), ("<|fim_pad|>", 3), ("<c>", 3)], {"eos": 2, "fim_pad": 0}),
    "gpt-oss": (
        [("<|return|>", 3), ("<|call|>", 3), ("<|end|>", 3), ("<|start|>", 3), ("<|endoftext|>", 3)],
        {"eos": 0},
    ),
    "gpt-oss without calls": ([("<|return|>", 3), ("<|end|>", 3)], {"eos": 0}),
    "gpt-oss, named": ([("<|return|>", 3), ("<|call|>", 3), ("<|end|>", 3)], {"eos": 2}),
    "Solar": ([("<|flush|>", 3), ("<|calls|>", 3), ("<|end|>", 3)], {"eos": 0}),
    "Gemma 4": ([("<eos>", 3), ("<turn|>", 3), ("<|tool_response>", 3), ("</s>", 3)], {"eos": 0}),
    "Phi 3": ([("</s>", 4), ("<|end|>", 3), ("<|endoftext|>", 3), ("<|assistant|>", 3)], {"eos": 2}),
    "Llama 3": ([("<|end_of_text|>", 3), ("<|eom_id|>", 3), ("<|eot_id|>", 3)], {"eos": 0}),
    "SmolLM 2": ([("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<reponame>", 3)], {"eos": 2}),
}


def texts(pre: str) -> list[str]:
    """The texts as a name's published tokenizer reads them; llama.cpp does not normalize."""
    return [unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].normalizes else text for text in TEXTS]


def metadata(pre: str) -> dict[str, Any]:
    """A vocabulary that shows where words end: bytes, or characters, with merges of any two and four in a row."""
    return {**_vocabulary(PRE_TOKENIZERS[pre].is_byte_level), "tokenizer.ggml.pre": pre}


@cache
def _vocabulary(is_byte_level: bool) -> dict[str, Any]:
    rng = random.Random(7)
    rows = [_letters(text) if is_byte_level else text.replace(" ", "▁") for text in (*TEXTS, *texts("qwen2"))]
    alphabet = list(_byte_letters()) if is_byte_level else sorted({letter for row in rows for letter in row} - {"\n"})
    pairs = sorted({row[i : i + 2] for row in rows for i in range(len(row) - 1)})
    quads = sorted({row[i : i + 4] for row in rows for i in range(len(row) - 3)})
    rng.shuffle(pairs)
    rng.shuffle(quads)
    whole = [_letters(word) if is_byte_level else word.replace(" ", "▁") for word in WHOLE]
    space = "\u0120" if is_byte_level else "▁"
    pairs = [pair for pair in pairs if pair != 2 * space]
    quads = [quad for quad in quads if quad != 4 * space][: len(quads) // 2]
    # Some tokenizers cut long runs of spaces.
    spaces = [space * count for count in (2, 4, 8, 16, 12, 20)]
    merged = [run for run in pairs + quads + spaces if is_byte_level or "\n" not in run]
    byte_pieces = [] if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = list(dict.fromkeys([*SPECIAL, *byte_pieces, *alphabet, *merged, *whole]))
    types = [3 if token in SPECIAL else 6 if token in byte_pieces else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{run[:cut]} {run[cut:]}" for run in merged for cut in [_cut(run)]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _cut(run: str) -> int:
    """Where the last merge of a token is: the middle, or after the largest power of two."""
    return 1 << ((len(run) - 1).bit_length() - 1)


def metadata_of_ends(case: str) -> dict[str, Any]:
    special, named = ENDS[case]
    letters = list(_byte_letters())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*(text for text, _ in special), *letters],
        "tokenizer.ggml.token_type": [*(kind for _, kind in special), *(1 for _ in letters)],
        "tokenizer.ggml.merges": [],
        **{f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in named.items()},
    }


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _letters(text: str) -> str:
    spelled = {byte: letter for letter, byte in _byte_letters().items()}
    return "".join(spelled[byte] for byte in text.encode())


def _load(values: dict[str, Any], folder: Path) -> Any:
    """llama.cpp's reading of a vocabulary."""
    import gguf
    import llama_cpp

    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    for key, value in values.items():
        add: Any = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}.get(type(value))
        if add is not None:
            add(key, value)
        elif value:
            writer.add_array(key, value)
        else:  # the writer passes over empty arrays
            writer.add_array(key, ["\u0120 \u0120"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(folder / "vocabulary.gguf"), vocab_only=True, verbose=False)


def main() -> None:
    """Ask llama.cpp. Equal rows of ids are stored once."""
    import llama_cpp

    rows: list[list[int]] = []
    names: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            model = _load(metadata(pre), Path(folder))
            names[pre] = []
            for text in texts(pre):
                ids = model.tokenize(text.encode(), add_bos=True, special=True)
                if ids not in rows:
                    rows.append(ids)
                names[pre].append(rows.index(ids))
        ends = {}
        for case, (special, _) in ENDS.items():
            model = _load(metadata_of_ends(case), Path(folder))
            vocab = llama_cpp.llama_model_get_vocab(model.model)
            ends[case] = [i for i in range(len(special)) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    lines = [f"  {json.dumps(row, separators=(',', ':'))}" for row in rows]
    groups = [f"  {json.dumps(name)}: {json.dumps(indices)}" for name, indices in names.items()]
    parts = ['{"rows": [', ",\n".join(lines), '],\n"names": {', ",\n".join(groups), "},"]
    parts.append(f'"ends": {json.dumps(ends, ensure_ascii=False, indent=1)}\n}}\n')
    DATA.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
