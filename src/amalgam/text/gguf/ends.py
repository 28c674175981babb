"""Which tokens of a GGUF vocabulary end an answer.

In: tokens with their types, and the ids that the metadata name. Out: ids.
Must never know: metadata, tokenizers, files.

As llama.cpp decides (src/llama-vocab.cpp, `special_eog_ids`): what the file names as the end of a sequence, of a turn,
of a message, and as the padding or a border between files in code; and tokens that are known for it by their text,
because most files name only one end of several. It differs in one thing: a text that can stand in an answer, such as
`</s>` in HTML, ends it only where the file marks the token as a special one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

# Texts that nothing but a control token has.
_UNMISTAKABLE = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
    }
)
_ENDS = _UNMISTAKABLE | {"</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<turn|>", "[e~["}
# By the key `tokenizer.ggml.<name>_token_id` that would name them.
_IN_CODE = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
NAMED = ("eos", "eot", "eom", *_IN_CODE)


def unmistakable(tokens: Sequence[str]) -> set[int]:
    """Ids of the tokens that are control tokens whatever type the file gives them."""
    return {token_id for token_id, token in enumerate(tokens) if token in _UNMISTAKABLE}


def end_ids(vocab: Mapping[str, int], special: Collection[int], named: Mapping[str, int | None]) -> frozenset[int]:
    """The ids that end an answer.

    Args:
        vocab: token → id.
        special: ids of control and user-defined tokens.
        named: the id of each of `NAMED`, None where the file has none.
    """
    ends = {vocab[text] for text in _ENDS if vocab.get(text) in special}
    for name, texts in _IN_CODE.items():
        if named[name] is None:
            ends |= set(sorted(vocab[text] for text in texts if vocab.get(text) in special)[:1])
    ends |= {token_id for token_id in named.values() if token_id is not None}
    found = {text for text in _ENDS if vocab.get(text) in ends}
    # Where a call of a tool has an end of its own, <|end|> only ends a part of the answer: gpt-oss, Solar.
    if {"<|return|>", "<|call|>"} <= found or ("<|flush|>" in found and found & {"<|call|>", "<|calls|>"}):
        ends.discard(vocab.get("<|end|>", -1))
    if "<|tool_response>" in found:  # Gemma 4, to which </s> is a word
        ends.discard(vocab.get("</s>", -1))
    return frozenset(ends)
