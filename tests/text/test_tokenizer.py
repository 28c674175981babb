import json
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from amalgam.errors import CheckpointError, RequestError
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises
from tests.lazy import Lazy
from tests.text.tokenizer_files import BOS, PROBES, TEXTS, sentence_piece

AutoTokenizer = Lazy("transformers", "AutoTokenizer")


@pytest.fixture
def demo_copy(tmp_path):
    """A folder with the demo model's tokenizer, to be damaged."""
    for path in DEMO.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestTokenizer:
    @pytest.mark.parametrize("name", TEXTS)
    def test_ids_are_those_of_transformers(self, tokenizer, name):
        assert tokenizer.encode(TEXTS[name]) == AutoTokenizer.from_pretrained(DEMO).encode(TEXTS[name])

    @pytest.mark.parametrize("name", [name for name in TEXTS if name != "special"])
    def test_decoding_gives_the_text_back(self, tokenizer, name):
        assert tokenizer.decode(tokenizer.encode(TEXTS[name])) == TEXTS[name]

    @pytest.mark.parametrize("name", [name for name in TEXTS if name != "special"])
    def test_the_bytes_of_the_tokens_are_those_of_the_text(self, tokenizer, name):
        token_ids = tokenizer.encode(TEXTS[name])
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == TEXTS[name].encode()

    def test_bytes_that_are_spelled_out_are_bytes(self):
        backend = Backend(models.BPE({"<0xE6>": 0, "a": 1}, [], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        spelled = Tokenizer(TokenizerParts(backend), frozenset())
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
            with raises(CheckpointError, 8192, others):
                tokenizer.check_vocabulary(others)

    @pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"])
    def test_no_link_leads_out_of_the_folder(self, demo_copy, tmp_path_factory, name):
        outside = tmp_path_factory.mktemp("outside") / "secret"
        outside.write_text("{{ 'secret' }}")
        (demo_copy / name).parent.mkdir(exist_ok=True)
        (demo_copy / name).unlink(missing_ok=True)
        (demo_copy / name).symlink_to(outside)
        with raises(CheckpointError, demo_copy / name, outside):
            Tokenizer.load(demo_copy)

    def test_no_linked_folder_leads_out_either(self, demo_copy, tmp_path_factory):
        outside = tmp_path_factory.mktemp("outside")
        (outside / "tool.jinja").write_text("{{ 'secret' }}")
        (demo_copy / "additional_chat_templates").symlink_to(outside)
        with raises(CheckpointError, demo_copy / "additional_chat_templates", outside):
            Tokenizer.load(demo_copy)

    def test_a_lone_surrogate_is_refused(self, tokenizer):
        with raises(RequestError, 2, repr("\ud800")):
            tokenizer.encode("ab\ud800")

    def test_transformers_is_imported_only_when_a_tokenizer_is_loaded(self):
        code = """
import sys
import amalgam.text.tokenizer
sys.exit(bool({"transformers", "torch", "tokenizers"} & set(sys.modules)))
"""
        assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


class TestChat:
    def test_a_conversation_becomes_a_prompt(self, tokenizer):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.encode_chat(messages) == tokenizer.encode(prompt)

    @pytest.mark.parametrize(
        ("messages", "named"),
        [
            ([], "messages"),
            ("hi", "messages"),
            ([{"role": "user", "content": "a"}, "hi"], "messages[1]"),
            ([{"role": "user"}], "messages[0]"),
            ([{"role": "user", "content": None}], "messages[0]"),
            ([{"role": 1, "content": "a"}], "messages[0]"),
            ([{"role": "user", "content": "a", "nmae": "x"}], "nmae"),
        ],
    )
    def test_malformed_messages_are_refused(self, tokenizer, messages, named):
        with raises(RequestError, named):
            tokenizer.encode_chat(messages)

    def test_without_a_template_there_is_no_chat(self, demo_copy):
        edit_json(demo_copy / "tokenizer_config.json", chat_template=None)
        tokenizer = Tokenizer.load(demo_copy)
        assert not tokenizer.has_chat_template
        with raises(RequestError):
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
        with raises(RequestError):
            Tokenizer.load(demo_copy).encode_chat([{"role": "user", "content": "hi"}])


class TestLoading:
    def test_a_folder_without_tokenizer(self, tmp_path):
        with raises(CheckpointError, tmp_path, "tokenizer.json"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0"}'])
    def test_a_damaged_tokenizer(self, demo_copy, content):
        (demo_copy / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError):
            Tokenizer.load(demo_copy)

    @pytest.mark.parametrize("value", ["</s>", -1, [0, "x"], True, 1.5])
    def test_an_end_of_sequence_that_is_no_token_id(self, demo_copy, value):
        edit_json(demo_copy / "generation_config.json", eos_token_id=value)
        with raises(CheckpointError, "eos_token_id", repr(value)):
            Tokenizer.load(demo_copy)

    @pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
    def test_a_damaged_generation_config(self, demo_copy, content):
        (demo_copy / "generation_config.json").write_bytes(content.encode("latin-1"))
        with raises(CheckpointError, demo_copy / "generation_config.json"):
            Tokenizer.load(demo_copy)

    @pytest.mark.parametrize("content", ['{"eos_token_id": 5, "a": NaN}', '{"a": 1, "a": 2, "eos_token_id": 5}'])
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_advice_that_is_no_strict_json_is_read(self, demo_copy, content, mark):
        (demo_copy / "generation_config.json").write_text(mark + content, encoding="utf-8")
        assert 5 in Tokenizer.load(demo_copy).eos_token_ids

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
            with raises(CheckpointError, demo_copy, "tokenizer.json"):
                Tokenizer.load(demo_copy)
        assert not canary.exists()


class TestTokenText:
    @pytest.mark.parametrize("text", [text for text in PROBES if text and "<" not in text])
    def test_the_texts_of_the_tokens_make_the_text(self, kind, text):
        token_ids = kind.encode(text)[1:]
        [before, *_] = kind.encode("a")[1:]
        expected = kind.decode([before, *token_ids])[len(kind.decode([before])) :]
        assert b"".join(map(kind.token_bytes, token_ids)) == expected.encode()

    def test_a_word_has_its_space(self):
        tokenizer = Tokenizer(TokenizerParts(sentence_piece("prepend")), frozenset())
        token_ids = tokenizer.encode("hello world")
        assert tokenizer.token_text(token_ids[1]).startswith(" ")
        assert tokenizer.token_text(token_ids[0]) == BOS
