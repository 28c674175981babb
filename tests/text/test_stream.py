import random
import time
from itertools import product

import pytest

from amalgam.text.parts import TokenizerParts
from amalgam.text.stream import TextStream
from amalgam.text.tokenizer import Tokenizer
from tests.cases import each_case
from tests.text.tokenizer_files import PROBES, TEXTS, sentence_piece, spelled_bytes


def stream_text(tokenizer, token_ids, stop=(), prompt_ids=()):
    stream = TextStream(tokenizer, stop, prompt_ids)
    parts = []
    for token_id in token_ids:
        parts.append(stream.push(token_id))
        if stream.is_stopped:
            break
    return [*parts, stream.finish()]


class TestStream:
    @pytest.mark.parametrize("name", TEXTS)
    def test_pieces_make_the_text_and_characters_come_whole(self, tokenizer, name):
        token_ids = tokenizer.encode(TEXTS[name])
        parts = stream_text(tokenizer, token_ids)
        assert "".join(parts) == tokenizer.decode(token_ids)
        if name != "replacement":
            assert not any("\ufffd" in part for part in parts)

    def test_text_comes_as_soon_as_it_is_whole(self, tokenizer):
        token_ids = tokenizer.encode("x 😀 y")
        parts = stream_text(tokenizer, token_ids)
        assert parts == ["x", " ", "", "", "", "😀", " y", ""]

    @pytest.mark.parametrize("seed", range(20))
    def test_any_tokens_make_the_text_of_all(self, tokenizer, seed):
        rng = random.Random(seed)
        single_bytes = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
        assert len(single_bytes) > 50
        pool = [*single_bytes, *rng.sample(range(tokenizer.vocab_size), 50)]  # a third is noise, or more
        token_ids = rng.choices(pool, k=400)
        assert "".join(stream_text(tokenizer, token_ids)) == tokenizer.decode(token_ids)

    @pytest.mark.parametrize("text", ["the a cat", "a 你好 b", " a", "a  a", "😀"])
    def test_decoders_that_treat_the_first_token_differently(self, text):
        tokenizer = Tokenizer(TokenizerParts(spelled_bytes()), frozenset())
        token_ids = tokenizer.encode(text)
        parts = stream_text(tokenizer, token_ids)
        assert "".join(parts) == tokenizer.decode(token_ids)
        assert not any("\ufffd" in part for part in parts)

    @pytest.mark.parametrize("seed", range(10))
    def test_bytes_are_put_together_as_the_decoder_does(self, tokenizer, seed):
        """All that UTF-8 forbids among it: overlong forms, surrogates, what is beyond U+10FFFF, ends that are cut."""
        rng = random.Random(seed)
        texts = {token_id: tokenizer.texts[token_id] for token_id in range(tokenizer.vocab_size)}
        by_byte = {text.encode() if isinstance(text, str) else text: token_id for token_id, text in texts.items()}
        hard = [
            b"\xc0\x80",
            b"\xe0\x80\x80",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\xf0\x9f\x98\x80",
            b"\xef\xbf\xbd",
        ]
        text = b"".join(rng.choice(hard)[: rng.randint(1, 4)] + rng.randbytes(rng.randint(0, 2)) for _ in range(200))
        token_ids = [by_byte[bytes([byte])] for byte in text]
        assert (
            "".join(stream_text(tokenizer, token_ids)) == tokenizer.decode(token_ids) == text.decode(errors="replace")
        )

    def test_endless_noise_costs_no_more_per_token(self, tokenizer):
        noise = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd")
        started = time.process_time()
        parts = stream_text(tokenizer, [noise] * 20_000)
        assert time.process_time() - started < 10
        assert len("".join(parts)) == 20_000
        assert len(parts[-1]) < 100

    def test_a_stop_string_and_what_follows_is_never_shown(self, tokenizer):
        stream = TextStream(tokenizer, ("\n\n",))
        shown = "".join(stream.push(token_id) for token_id in tokenizer.encode("First line\nsecond\n\nthird"))
        assert (shown + stream.finish(), stream.is_stopped) == ("First line\nsecond", True)
        assert stream.push(tokenizer.encode("more")[0]) == ""

    def test_what_may_begin_a_stop_string_is_held_back_until_it_is_clear(self, tokenizer):
        stream = TextStream(tokenizer, ("END",))
        (e, n, d) = (tokenizer.encode(letter)[0] for letter in "END")
        assert [stream.push(e), stream.push(e), stream.push(n), stream.push(n)] == ["", "E", "", "ENN"]
        assert [stream.push(e), stream.push(n), stream.finish()] == ["", "", "EN"]
        assert not stream.is_stopped
        stream = TextStream(tokenizer, ("END",))
        assert [stream.push(e), stream.push(n), stream.push(d), stream.is_stopped] == ["", "", "", True]

    def test_a_stop_string_inside_a_token_cuts_it(self, tokenizer):
        token_ids = tokenizer.encode(" return")
        assert len(token_ids) == 1
        assert "".join(stream_text(tokenizer, token_ids, stop=("tu",))) == " re"

    @pytest.mark.parametrize("seed", range(20))
    def test_any_stop_strings_cut_at_the_first_of_them(self, tokenizer, seed):
        rng = random.Random(seed)
        text = "".join(rng.choices(["a", "b", "ab", "ba", "明", "月", "😀", " "], k=60))
        stop = {"".join(rng.choices("ab明😀", k=rng.randint(2, 6))) for _ in range(3)}
        stop = tuple(s for s in stop if not any(t != s and t in s for t in stop))
        found = [text.index(s) for s in stop if s in text]
        token_ids = tokenizer.encode(text)
        assert "".join(stream_text(tokenizer, token_ids, stop)) == text[: min(found, default=len(text))]


def continuation(tokenizer, prompt_ids, token_ids):
    """The text of an answer as transformers' text generation has it: that of all without that of the prompt."""
    before, text = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *token_ids])
    return text[len(before) :] if text.startswith(before) else None  # None: the prompt ends inside of a character


def some_ids(rng, tokenizer, num_tokens):
    """Tokens at random: whole texts, and among them special tokens and lone bytes."""
    token_ids = []
    while len(token_ids) < num_tokens:
        token_ids += tokenizer.encode(rng.choice(PROBES))[rng.randint(0, 1) :]
        token_ids += rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 3))
    return token_ids[:num_tokens]


class TestContinuation:
    def test_the_first_space_is_kept(self):
        tokenizer = Tokenizer(TokenizerParts(sentence_piece("prepend")), frozenset())
        prompt_ids, answer_ids = tokenizer.encode("hello"), tokenizer.encode("world")[1:]
        assert "".join(stream_text(tokenizer, answer_ids, prompt_ids=prompt_ids)) == " world"
        assert "".join(stream_text(tokenizer, answer_ids)) == "world"  # a text of its own
        assert "".join(stream_text(tokenizer, answer_ids, (" w",), prompt_ids)) == ""

    def test_the_text_is_that_of_all_without_that_of_the_prompt(self, kind):
        num_compared = 0
        with each_case() as case:
            for seed in range(60):
                rng = random.Random(seed)
                prompt_ids = some_ids(rng, kind, rng.randint(1, 40))
                token_ids = kind.encode(rng.choice(PROBES))[1:] or [0]
                expected = continuation(kind, prompt_ids, token_ids)
                with case(seed):
                    if expected is not None and "\ufffd" not in expected:
                        assert "".join(stream_text(kind, token_ids, prompt_ids=prompt_ids)) == expected
                        num_compared += 1
        assert num_compared > 30

    def test_after_special_tokens(self, kind):
        special = next(iter(kind.special_tokens))
        texts, answers = ("", "hello", " ", "\n", "你"), ("world", " world", "  ", "\n", "你")
        with each_case() as case:
            for text, answer, num_special in product(texts, answers, (1, 3, 50)):
                prompt_ids, token_ids = [*kind.encode(text)[1:], *[special] * num_special], kind.encode(answer)[1:]
                with case(repr(text), repr(answer), num_special):
                    parts = stream_text(kind, token_ids, prompt_ids=prompt_ids)
                    assert "".join(parts) == continuation(kind, prompt_ids, token_ids)

    @pytest.mark.parametrize("cut", [1, 2, 3])
    @pytest.mark.parametrize("before", ["", "hello ", "你", "😀😀😀😀"])
    def test_a_character_that_the_prompt_begins(self, kind, cut, before):
        """The answer's text has the whole character, as the prompt's has none of it."""
        token_ids = kind.encode(
            f"{before}😀 x",
        )
        end = len(kind.encode(f"{before}😀")) - 4 + cut
        assert "".join(stream_text(kind, token_ids[end:], prompt_ids=token_ids[:end])) == "😀 x"

    def test_a_character_that_the_prompt_begins_and_the_answer_does_not_end(self, kind):
        prompt_ids, token_ids = kind.encode("a😀")[:-2], kind.encode("hello")[1:]
        parts = stream_text(kind, token_ids, prompt_ids=prompt_ids)
        assert "".join(parts) == continuation(kind, prompt_ids, token_ids)

    def test_characters_of_bytes_that_continue_a_long_run_of_them(self, kind):
        """The decoder of SentencePiece reads bytes in a row as one text: cut within a character, all would be lost."""
        token_ids = kind.encode("龘靐齉爩鱻麤" * 3)
        for end in range(1, len(token_ids)):
            shown = "".join(stream_text(kind, token_ids[end:], prompt_ids=token_ids[:end]))
            assert "\ufffd" not in shown
            assert kind.decode(token_ids).endswith(shown)
            assert len(shown) >= (len(token_ids) - end) // 3

    def test_a_long_prompt_costs_no_more(self, kind):
        prompt_ids = kind.encode("hello world ") * 50_000
        started = time.process_time()
        for _ in range(20):
            TextStream(kind, (), prompt_ids)
        assert time.process_time() - started < 2

    @pytest.mark.parametrize("token", ["special", "beyond the vocabulary"])
    def test_tokens_without_text_cost_no_more_as_they_get_more(self, kind, token):
        token_id = next(iter(kind.special_tokens)) if token == "special" else 10**6
        [before, *_], after = kind.encode("hello")[1:], kind.encode("world")[1:]
        started = time.process_time()
        parts = stream_text(kind, [before, *[token_id] * 20_000, *after])
        assert time.process_time() - started < 5
        assert "".join(parts) == kind.decode([before, *after])


class TestSpecialTokensAsStopStrings:
    END = "<|im_end|>"

    @pytest.fixture
    def stop_text(self, tokenizer):
        def stop_text(text, *stop, prompt=""):
            stream = TextStream(tokenizer, stop, tokenizer.encode(prompt))
            shown = ""
            for token_id in tokenizer.encode(text):
                shown += stream.push(token_id)
                if stream.is_stopped:
                    return shown, True
            return shown + stream.finish(), stream.is_stopped

        return stop_text

    @pytest.mark.parametrize(
        ("text", "stop", "shown"),
        [
            ("one<|im_end|>two", ("<|im_end|>",), "one"),
            ("<|im_end|>two", ("<|im_end|>",), ""),
            ("one\n<|im_end|>two", ("\n<|im_end|>",), "one"),
            ("one<|im_end|>\ntwo", ("<|im_end|>\n",), "one"),
            ("one<|im_end|>two<|im_end|>\n", ("<|im_end|>\n",), "onetwo"),
            ("one<|im_end|><|im_start|>user", ("<|im_end|><|im_start|>",), "one"),
            ("one<|im_end|><|im_start|>user", ("e<|im_end|><|im_start|>us",), "on"),
            ("one<|im_start|><|im_end|>", ("one<|im_end|>",), None),
            ("one<|im_start|><|im_start|><|im_end|>two", ("<|im_start|><|im_end|>",), "one"),
            ("ab<|im_start|>cd", ("bc",), "a"),
            ("ab<|im_start|>cd<|im_end|>", ("bc", "<|im_end|>"), "a"),
            ("ab<|im_start|>xd<|im_end|>", ("bc", "<|im_end|>"), "abxd"),
            ("ab<|im_start|>cd", ("<|im_end|>", "im_start"), None),
            ("ab<|im_start|>cd", ("<|im_end|>", "<|"), None),
            ("a <|im_end|>", (" ", "<|im_end|>"), "a"),
            ("你<|im_end|>", ("<|im_end|>",), "你"),
        ],
    )
    def test_the_answer_ends_before_it(self, tokenizer, stop_text, text, stop, shown):
        expected = tokenizer.decode(tokenizer.encode(text)) if shown is None else shown
        assert stop_text(text, *stop) == (expected, shown is not None)

    def test_spelled_out_it_is_the_same_string(self, tokenizer):
        letters = [token_id for letter in self.END for token_id in tokenizer.encode(letter)]
        assert "".join(stream_text(tokenizer, [*letters, *tokenizer.encode("x")], (self.END,))) == ""

    @pytest.mark.parametrize(
        ("stop", "shown"), [("ne<|im_end|>", "o"), ("<|im_end|>", "one"), ("<|im_end|>\n", "one"), ("ne", "o")]
    )
    def test_the_token_that_ends_the_answer_may_complete_one(self, tokenizer, stop, shown):
        stream = TextStream(tokenizer, (stop,))
        text = "".join(map(stream.push, tokenizer.encode("one")))
        assert text + stream.finish(*tokenizer.encode(self.END)) == shown

    def test_what_the_prompt_ends_with_does_not_count(self, stop_text):
        assert stop_text("\nhello", "<|im_end|>\n", prompt="a<|im_end|>") == ("\nhello", False)

    def test_bytes_without_an_end_are_shown_before_it(self, tokenizer):
        """As before an end of sequence."""
        [half, *_] = tokenizer.encode("😀")
        [end] = tokenizer.encode(self.END)
        assert "".join(stream_text(tokenizer, [half, end], (self.END,))) == "\ufffd"

    def test_a_character_around_another_special_token_stays_whole(self, tokenizer):
        smile, [start], [end] = tokenizer.encode("😀"), tokenizer.encode("<|im_start|>"), tokenizer.encode(self.END)
        assert len(smile) > 1
        token_ids = [smile[0], start, *smile[1:], end]
        assert "".join(stream_text(tokenizer, token_ids, (self.END,))) == "😀"

    def test_endless_special_tokens_cost_no_more_per_token(self, tokenizer):
        [start], letter = tokenizer.encode("<|im_start|>"), tokenizer.encode("b")[0]
        started = time.process_time()
        stop = ("bc", "<|im_start|><|im_end|>")
        assert "".join(stream_text(tokenizer, [letter, *[start] * 20_000], stop)) == "b"
        assert time.process_time() - started < 10

    @pytest.mark.parametrize("seed", range(60))
    def test_any_of_them_cut_at_the_first(self, tokenizer, seed):
        """Against a search in all of the text, after every part of it."""
        rng = random.Random(seed)
        names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        parts = rng.choices([*"ab明😀 ", *names], k=60)
        stop = tuple({"".join(rng.choices([*"ab明", *names], k=rng.randint(1, 4))) for _ in range(3)})
        raw, visible, expected = "", "", None
        origin = []  # of each character of `raw`, how much was visible before it
        for part in parts:
            is_shown = part not in names
            origin += [len(visible) + index * is_shown for index in range(len(part))]
            raw, visible = raw + part, visible + part * is_shown
            named = [string for string in stop if any(name in string for name in names)]
            found = [origin[raw.find(string)] for string in named if string in raw]
            found += [visible.find(string) for string in stop if string not in named and string in visible]
            if found:
                expected = visible[: min(found)]
                break
        token_ids = [token_id for part in parts for token_id in tokenizer.encode(part)]
        assert "".join(stream_text(tokenizer, token_ids, stop)) == (visible if expected is None else expected)


class TestSpecialTokensThatAreShown:
    def stream(self, tokenizer, token_ids, stop=()):
        stream = TextStream(tokenizer, stop, keeps_special_tokens=True)
        return [*map(stream.push, token_ids), stream.finish(token_ids[-1])]

    def test_they_come_where_they_stand(self, tokenizer):
        token_ids = tokenizer.encode("a<|im_start|>b明<|im_end|>c")
        assert "".join(self.stream(tokenizer, token_ids)) == "a<|im_start|>b明<|im_end|>c"

    def test_a_character_that_breaks_off_before_one(self, tokenizer):
        token_ids = [*tokenizer.encode("😀")[:1], *tokenizer.encode("<|im_start|>a")]
        assert "".join(self.stream(tokenizer, token_ids)).endswith("<|im_start|>a")

    def test_stop_strings_see_them(self, tokenizer):
        token_ids = tokenizer.encode("a<|im_start|>bc")
        assert "".join(self.stream(tokenizer, token_ids, ("<|im_start|>b",))) == "a"
