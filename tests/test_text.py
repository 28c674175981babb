import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from amalgam.errors import CheckpointError, RequestError
from amalgam.text import TextStream, Tokenizer

DEMO = Path(__file__).parents[1] / "models" / "demo"
TEXTS = {
    "english": "It was the best of times, it was the worst of times; she said: 'I can't.'\n\n  Indented.",
    "chinese": "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。龘靐齉爩鱻麤",
    "emoji": "ok 😀👩‍👩‍👧‍👦 e\u0301 🇨🇭 done",
    "python": "def f(x: int) -> str:\n\treturn f'{x!r:>{10}}'  # naïve\n",
    "replacement": "a genuine \ufffd stays, and \ufffd\ufffd",
    "special": "one<|im_end|>two<|endoftext|> three",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO)


@pytest.fixture
def demo_copy(tmp_path):
    """A folder with the demo model's tokenizer, to be damaged."""
    for path in DEMO.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stream_text(tokenizer, token_ids, stop=()):
    stream = TextStream(tokenizer, stop)
    parts = []
    for token_id in token_ids:
        parts.append(stream.push(token_id))
        if stream.is_stopped:
            break
    return [*parts, stream.finish()]


def sentencepiece_like():
    """Pieces with ▁ for spaces and bytes for what has no piece, as Llama 2 and Mixtral publish them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip],
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


class TestTokenizer:
    @pytest.mark.parametrize("name", TEXTS)
    def test_ids_are_those_of_transformers(self, tokenizer, name):
        assert tokenizer.encode(TEXTS[name]) == AutoTokenizer.from_pretrained(DEMO).encode(TEXTS[name])

    @pytest.mark.parametrize("name", set(TEXTS) - {"special"})
    def test_decoding_gives_the_text_back(self, tokenizer, name):
        assert tokenizer.decode(tokenizer.encode(TEXTS[name])) == TEXTS[name]

    @pytest.mark.parametrize("name", set(TEXTS) - {"special"})
    def test_the_bytes_of_the_tokens_are_those_of_the_text(self, tokenizer, name):
        token_ids = tokenizer.encode(TEXTS[name])
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == TEXTS[name].encode()

    def test_bytes_that_are_spelled_out_are_bytes(self):
        backend = Backend(models.BPE({"<0xE6>": 0, "a": 1}, [], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        spelled = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
        assert [spelled.token_bytes(token_id) for token_id in (0, 1)] == [b"\xe6", b"a"]

    def test_special_tokens_have_no_text(self, tokenizer):
        assert tokenizer.decode(tokenizer.encode(TEXTS["special"])) == "onetwo three"

    def test_ids_beyond_the_vocabulary_have_no_text(self, tokenizer):
        assert tokenizer.decode([*tokenizer.encode("so"), 10**9]) == "so"

    def test_end_of_sequence_is_what_any_of_the_files_says(self, tokenizer):
        assert tokenizer.eos_token_ids == {0, 2}

    def test_the_vocabulary_must_fit_the_embedding(self, tokenizer):
        tokenizer.check_vocabulary(8192)
        tokenizer.check_vocabulary(9000)
        for others in (8191, 32_000):
            with pytest.raises(CheckpointError, match=f"8192 tokens and the model's embedding {others} rows"):
                tokenizer.check_vocabulary(others)

    @pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"])
    def test_no_link_leads_out_of_the_folder(self, demo_copy, tmp_path_factory, name):
        outside = tmp_path_factory.mktemp("outside") / "secret"
        outside.write_text("{{ 'secret' }}")
        (demo_copy / name).parent.mkdir(exist_ok=True)
        (demo_copy / name).unlink(missing_ok=True)
        (demo_copy / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match="outside of its folder"):
            Tokenizer.load(demo_copy)

    def test_no_linked_folder_leads_out_either(self, demo_copy, tmp_path_factory):
        outside = tmp_path_factory.mktemp("outside")
        (outside / "tool.jinja").write_text("{{ 'secret' }}")
        (demo_copy / "additional_chat_templates").symlink_to(outside)
        with pytest.raises(CheckpointError, match="outside of its folder"):
            Tokenizer.load(demo_copy)

    def test_a_lone_surrogate_is_refused(self, tokenizer):
        with pytest.raises(RequestError, match="lone surrogate at character 2"):
            tokenizer.encode("ab\ud800")

    def test_transformers_is_imported_only_when_a_tokenizer_is_loaded(self):
        code = "import sys, amalgam.text; sys.exit(bool({'transformers', 'torch', 'tokenizers'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


class TestChat:
    def test_a_conversation_becomes_a_prompt(self, tokenizer):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.encode_chat(messages) == tokenizer.encode(prompt)

    @pytest.mark.parametrize(
        ("messages", "named"),
        [
            ([], "messages is"),
            ("hi", "messages is"),
            ([{"role": "user", "content": "a"}, "hi"], r"messages\[1\] is 'hi'"),
            ([{"role": "user"}], r"messages\[0\] is"),
            ([{"role": "user", "content": None}], r"messages\[0\] is"),
            ([{"role": 1, "content": "a"}], r"messages\[0\] is"),
            ([{"role": "user", "content": "a", "nmae": "x"}], "nmae"),
        ],
    )
    def test_malformed_messages_are_refused(self, tokenizer, messages, named):
        with pytest.raises(RequestError, match=named):
            tokenizer.encode_chat(messages)

    def test_without_a_template_there_is_no_chat(self, demo_copy):
        edit_json(demo_copy / "tokenizer_config.json", chat_template=None)
        tokenizer = Tokenizer.load(demo_copy)
        assert not tokenizer.has_chat_template
        with pytest.raises(RequestError, match="no chat template"):
            tokenizer.encode_chat([{"role": "user", "content": "hi"}])

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('roles must alternate') }}",
            "{{ messages[7].role }}",
            "{% for %}",
            "{{ 1 / 0 }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% for i in range(10 ** 9) %}x{% endfor %}",
        ],
    )
    def test_whatever_goes_wrong_in_a_template_is_the_requests_error(self, demo_copy, template):
        edit_json(demo_copy / "tokenizer_config.json", chat_template=template)
        with pytest.raises(RequestError, match="chat template refuses"):
            Tokenizer.load(demo_copy).encode_chat([{"role": "user", "content": "hi"}])


class TestLoading:
    def test_a_folder_without_tokenizer(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"has no tokenizer.*tokenizer\.json"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0"}'])
    def test_a_damaged_tokenizer(self, demo_copy, content):
        (demo_copy / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError):
            Tokenizer.load(demo_copy)

    @pytest.mark.parametrize("value", ["</s>", -1, [0, "x"], True, 1.5])
    def test_an_end_of_sequence_that_is_no_token_id(self, demo_copy, value):
        edit_json(demo_copy / "generation_config.json", eos_token_id=value)
        with pytest.raises(CheckpointError, match="eos_token_id = "):
            Tokenizer.load(demo_copy)

    @pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
    def test_a_damaged_generation_config(self, demo_copy, content):
        (demo_copy / "generation_config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"generation_config\.json' is not valid JSON"):
            Tokenizer.load(demo_copy)

    def test_a_missing_generation_config_is_fine(self, demo_copy):
        (demo_copy / "generation_config.json").unlink()
        assert Tokenizer.load(demo_copy).eos_token_ids == {0}

    @pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "CanaryTokenizer"])
    @pytest.mark.parametrize("model_type", ["qwen3_moe", "unheard_of"])
    @pytest.mark.parametrize("has_tokenizer_json", [True, False])
    def test_code_that_the_folder_brings_along_is_not_run(
        self, demo_copy, tokenizer_class, model_type, has_tokenizer_json
    ):
        canary = demo_copy / "canary"
        code = f"open({str(canary)!r}, 'w').close()\nclass CanaryTokenizer: pass\nclass CanaryConfig: pass\n"
        (demo_copy / "evil.py").write_text(code)
        auto_map = {"AutoTokenizer": [None, "evil.CanaryTokenizer"], "AutoConfig": "evil.CanaryConfig"}
        edit_json(demo_copy / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer_class)
        edit_json(demo_copy / "config.json", auto_map=auto_map, model_type=model_type)
        if has_tokenizer_json:
            Tokenizer.load(demo_copy)
        else:
            (demo_copy / "tokenizer.json").rename(demo_copy / "vocab.json")
            with pytest.raises(CheckpointError, match="custom code is not run"):
                Tokenizer.load(demo_copy)
        assert not canary.exists()


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
        tokenizer = sentencepiece_like()
        token_ids = tokenizer.encode(text)
        parts = stream_text(tokenizer, token_ids)
        assert "".join(parts) == tokenizer.decode(token_ids)
        assert not any("\ufffd" in part for part in parts)

    def test_endless_noise_costs_no_more_per_token(self, tokenizer):
        noise = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd")
        started = time.monotonic()
        parts = stream_text(tokenizer, [noise] * 20_000)
        assert time.monotonic() - started < 5
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
