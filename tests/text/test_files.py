"""What a folder's tokenizer is: the published file, and what the files beside it may add."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, processors
from tokenizers import Tokenizer as Backend

from amalgam.errors import AmalgamError, CheckpointError, UnsupportedError
from amalgam.text.tokenizer import Tokenizer
from tests.cases import each_case
from tests.errors import raises
from tests.lazy import Lazy
from tests.text.tokenizer_files import (
    BOS,
    DEEPSEEK3,
    EOS,
    LLAMA3,
    PROBES,
    QWEN2,
    USER,
    byte_level,
    publish,
    sentence_piece,
)

AutoTokenizer = Lazy("transformers", "AutoTokenizer")

KINDS: dict[str, Callable[[], Backend]] = {
    "llama3": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(QWEN2, bos=False),
    "qwen2-nfc": lambda: byte_level(QWEN2, normalizer=normalizers.NFC(), bos=False),
    "llama3-nfc": lambda: byte_level(LLAMA3, normalizer=normalizers.NFC()),
    "deepseek3": lambda: byte_level(DEEPSEEK3),
    "prepend": lambda: sentence_piece("prepend"),
    "first": lambda: sentence_piece("first"),
    "never": lambda: sentence_piece("never"),
}
CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "GemmaTokenizer",
    "CohereTokenizer",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "SomebodysTokenizer",
)
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "deepseek_v3", "olmoe", "phimoe", "gpt2", "unknown")


@pytest.fixture(scope="module", params=KINDS)
def published(request: pytest.FixtureRequest) -> Backend:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def llama3() -> Backend:
    return KINDS["llama3"]()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestTheFileIsTheTruth:
    def test_whatever_class_is_declared(self, published: Backend, tmp_path: Path) -> None:
        ids = [published.encode(text).ids for text in PROBES]
        texts = [published.decode(token_ids) for token_ids in ids]
        for name in CLASSES:
            for settings in ({}, {"legacy": True}, {"legacy": False, "add_prefix_space": True}):
                model_type = MODEL_TYPES[len(name) % len(MODEL_TYPES)]
                found = Tokenizer.load(publish(tmp_path, published, model_type, tokenizer_class=name, **settings))
                assert [found.encode(text) for text in PROBES] == ids, name
                assert [found.decode(token_ids) for token_ids in ids] == texts, name

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_whatever_model_it_belongs_to(self, published: Backend, model_type: str, tmp_path: Path) -> None:
        found = Tokenizer.load(publish(tmp_path, published, model_type, tokenizer_class="LlamaTokenizer"))
        assert [found.encode(text) for text in PROBES] == [published.encode(text).ids for text in PROBES]

    def test_without_any_file_beside_it(self, published: Backend, tmp_path: Path) -> None:
        published.save(str(tmp_path / "tokenizer.json"))
        found = Tokenizer.load(tmp_path)
        assert [found.encode(text) for text in PROBES] == [published.encode(text).ids for text in PROBES]
        assert found.eos_token_ids == frozenset()

    def test_where_transformers_takes_the_file_too(self, published: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, published, extra_special_tokens=[USER], pad_token=EOS)
        theirs = AutoTokenizer.from_pretrained(folder)
        found = Tokenizer.load(folder)
        for text in PROBES:
            assert found.encode(text) == theirs.encode(text)
            assert found.decode(found.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)

    def test_neither_transformers_nor_torch_is_imported(self, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, chat_template="{{ bos_token }}{{ messages[0].content }}")
        code = (
            "import sys; from pathlib import Path; from amalgam.text.tokenizer import Tokenizer;"
            "found = Tokenizer.load(Path(sys.argv[1])); assert found.encode_chat([{'role': 'user', 'content': 'a'}]);"
            "sys.exit(bool({'transformers', 'torch'} & set(sys.modules)))"
        )
        environment = {"PYTHONPATH": ":".join(sys.path)}
        assert subprocess.run([sys.executable, "-c", code, str(folder)], env=environment).returncode == 0

    def test_truncation_and_padding_of_its_training_are_off(self, llama3: Backend, tmp_path: Path) -> None:
        backend = Backend.from_str(llama3.to_str())
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        found = Tokenizer.load(publish(tmp_path, backend))
        assert found.encode(PROBES[2]) == llama3.encode(PROBES[2]).ids


class TestWhatStandsAroundAText:
    """DeepSeek's tokenizer.json has no template; whether a text begins with a token says tokenizer_config.json."""

    @pytest.mark.parametrize("adds_bos", [True, False, None])
    @pytest.mark.parametrize("adds_eos", [True, False, None])
    @pytest.mark.parametrize("post_processor", [None, processors.ByteLevel(trim_offsets=False)])
    def test_without_a_template_the_config_says_it(
        self, adds_bos: bool | None, adds_eos: bool | None, post_processor: Any, tmp_path: Path
    ) -> None:
        backend = byte_level(DEEPSEEK3, bos=False)
        backend.post_processor = post_processor
        settings = {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
        found = Tokenizer.load(publish(tmp_path, backend, tokenizer_class="LlamaTokenizerFast", **settings))
        before, after = [0] if adds_bos else [], [1] if adds_eos else []
        assert found.encode("so") == [*before, *backend.encode("so").ids, *after]

    @pytest.mark.parametrize("adds_bos", [True, False, None])
    @pytest.mark.parametrize(
        "single", [f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}", "$A"], ids=["bos", "eos", "both", "nothing"]
    )
    def test_with_one_it_holds(self, adds_bos: bool | None, single: str, llama3: Backend, tmp_path: Path) -> None:
        backend = Backend.from_str(llama3.to_str())
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(BOS, 0), (EOS, 1)])
        found = Tokenizer.load(publish(tmp_path, backend, tokenizer_class="LlamaTokenizer", add_bos_token=adds_bos))
        assert found.encode("so") == backend.encode("so").ids

    def test_a_chat_has_its_first_token_from_the_template_alone(self, tmp_path: Path) -> None:
        template = "{{ bos_token }}{{ messages[0].content }}"
        folder = publish(tmp_path, byte_level(DEEPSEEK3, bos=False), add_bos_token=True, chat_template=template)
        found = Tokenizer.load(folder)
        assert found.encode_chat([{"role": "user", "content": "so"}]) == found.encode("so")
        assert found.encode("so").count(0) == 1

    def test_a_first_token_that_there_is_not(self, tmp_path: Path) -> None:
        folder = publish(tmp_path, byte_level(QWEN2, bos=False), add_bos_token=True, bos_token="<|other|>")
        with raises(CheckpointError, "add_bos_token", "<|other|>"):
            Tokenizer.load(folder)


class TestTokensThatTheOtherFilesName:
    def test_a_word_that_is_named_special_becomes_special(self, llama3: Backend, tmp_path: Path) -> None:
        """As with transformers: otherwise a chat template's end of a turn would be cut into letters."""
        data = json.loads(llama3.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != EOS]
        found = Tokenizer.load(folder := publish(tmp_path, Backend.from_str(json.dumps(data))))
        assert found.encode(f"a{EOS}b") == AutoTokenizer.from_pretrained(folder).encode(f"a{EOS}b")
        assert found.encode(f"a{EOS}b").count(1) == 1
        assert found.decode(found.encode(f"a{EOS}b")) == "ab"
        assert found.eos_token_ids == {1}

    @pytest.mark.parametrize("form", ["text", "object", "extra", "additional", "older"])
    def test_however_it_is_named(self, form: str, llama3: Backend, tmp_path: Path) -> None:
        data = json.loads(llama3.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != EOS]
        flags = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": True}
        config: dict[str, Any] = {
            "text": {},
            "object": {"eos_token": flags},
            "extra": {"eos_token": None, "extra_special_tokens": {"turn_token": EOS}},
            "additional": {"eos_token": None, "additional_special_tokens": [EOS]},
            "older": {"eos_token": None},
        }[form]
        folder = publish(tmp_path, Backend.from_str(json.dumps(data)), **config)
        if form == "older":
            (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
        assert Tokenizer.load(folder).encode(EOS)[-1] == 1

    @pytest.mark.parametrize("name", ["eos_token", "pad_token", "image_token"])
    def test_one_that_the_vocabulary_lacks_gets_no_id(
        self, name: str, llama3: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """transformers gives it the next one, for which the model may have no embedding."""
        found = Tokenizer.load(publish(tmp_path, llama3, **{name: "<|none|>"}))
        assert found.vocab_size == llama3.get_vocab_size()
        assert found.encode("<|none|>") == llama3.encode("<|none|>").ids
        assert "<|none|>" in caplog.text

    @pytest.mark.parametrize("special", [True, False])
    @pytest.mark.parametrize("file", ["added_tokens_decoder", "added_tokens.json"])
    def test_one_more_under_the_id_that_it_is_given(
        self, special: bool, file: str, llama3: Backend, tmp_path: Path
    ) -> None:
        token_id, name = llama3.get_vocab_size(), "<|think|>"
        folder = publish(tmp_path, llama3, **({"think_token": name} if special else {}))
        if file == "added_tokens.json":
            (folder / file).write_text(json.dumps({name: token_id}))
        else:
            declared = {str(token_id): {"content": name, "special": special}, "0": {"content": BOS, "special": True}}
            edit(folder / "tokenizer_config.json", added_tokens_decoder=declared)
        found = Tokenizer.load(folder)
        assert found.encode(f"a{name}") == [*llama3.encode("a").ids, token_id]
        assert found.decode([token_id]) == ("" if special else name)

    @pytest.mark.parametrize("token_id", [0, 5, 700, 10**9])
    @pytest.mark.parametrize("name", [USER, "<|think|>", "hello"])
    @pytest.mark.parametrize("file", ["added_tokens_decoder", "added_tokens.json"])
    def test_another_id_than_the_tokenizers_is_refused(
        self, token_id: int, name: str, file: str, llama3: Backend, tmp_path: Path
    ) -> None:
        folder = publish(tmp_path, llama3)
        if file == "added_tokens.json":
            (folder / file).write_text(json.dumps({name: token_id}))
        else:
            edit(folder / "tokenizer_config.json", added_tokens_decoder={str(token_id): {"content": name}})
        with raises(CheckpointError, name, token_id):
            Tokenizer.load(folder)

    def test_flags_that_differ_are_those_of_the_file(
        self, llama3: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        flags = {"content": USER, "lstrip": True, "rstrip": True, "special": False}
        folder = publish(tmp_path, llama3, added_tokens_decoder={str(llama3.token_to_id(USER)): flags})
        found = Tokenizer.load(folder)
        text = f"a  {USER}  b"
        assert found.encode(text) == llama3.encode(text).ids
        assert found.decode(found.encode(text)) == llama3.decode(llama3.encode(text).ids)
        assert USER in caplog.text

    def test_text_that_looks_special_can_be_declared_to_be_text(self, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, split_special_tokens=True)
        expected = AutoTokenizer.from_pretrained(folder).encode(f"a{EOS}")
        assert Tokenizer.load(folder).encode(f"a{EOS}") == expected
        assert expected[-1] != 1


class TestRefusals:
    @pytest.mark.parametrize(
        "changes",
        [
            {"bos_token": 3},
            {"bos_token": ["<s>"]},
            {"eos_token": {"text": "</s>"}},
            {"add_bos_token": "true"},
            {"split_special_tokens": 1},
            {"added_tokens_decoder": []},
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            {"added_tokens_decoder": {"1": "a"}},
            {"added_tokens_decoder": {"1": {"content": "a", "special": "yes"}}},
            {"additional_special_tokens": "<|a|>"},
            {"additional_special_tokens": [3]},
            {"chat_template": 3},
            {"chat_template": ["a"]},
            {"chat_template": [{"name": "default"}]},
            {"chat_template": [{"name": "default", "template": 3}]},
        ],
        ids=str,
    )
    def test_values_of_another_kind(self, changes: dict[str, Any], llama3: Backend, tmp_path: Path) -> None:
        with raises(CheckpointError, next(iter(changes))):
            Tokenizer.load(publish(tmp_path, llama3, **changes))

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    @pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
    def test_damaged_files(self, name: str, content: bytes, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3)
        (folder / name).write_bytes(content)
        with raises(CheckpointError, name):
            Tokenizer.load(folder)

    def test_an_added_token_under_an_id_that_it_does_not_have(self, llama3: Backend, tmp_path: Path) -> None:
        """The tokenizers library gives it another one and says nothing."""
        folder = publish(tmp_path, llama3)
        data = json.loads((folder / "tokenizer.json").read_text())
        data["added_tokens"].append({**data["added_tokens"][-1], "content": "<|far|>", "id": 5000})
        edit(folder / "tokenizer.json", added_tokens=data["added_tokens"])
        with raises(CheckpointError, "<|far|>", 5000):
            Tokenizer.load(folder)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_damaged_bytes_are_our_errors_or_load(self, name: str, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, added_tokens_decoder={"0": {"content": BOS, "special": True}})
        published = (folder / name).read_bytes()
        with each_case() as case:
            for seed in range(40):
                rng, data = random.Random(seed), bytearray(published)
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0129aZ\\ \xff')
                (folder / name).write_bytes(data)
                with case(seed), contextlib.suppress(AmalgamError):
                    Tokenizer.load(folder).encode("hello")

    @pytest.mark.parametrize(
        "changes",
        [
            {"added_tokens": None},
            {"added_tokens": [{"id": 0}]},
            {"added_tokens": [{"id": 2**40, "content": "x", "special": True}]},
            {"model": None},
            {"model": {"type": "BPE", "vocab": {}, "merges": []}},
            {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
            {"model": {"type": "Unigram", "vocab": [], "unk_id": 0}},
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            {"post_processor": {"type": "Unheard"}},
            {"decoder": {"type": "Unheard"}},
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        ],
        ids=str,
    )
    def test_parts_that_make_no_sense_are_refused(
        self, changes: dict[str, Any], llama3: Backend, tmp_path: Path
    ) -> None:
        folder = publish(tmp_path, llama3)
        edit(folder / "tokenizer.json", **changes)
        with raises(CheckpointError, folder):
            Tokenizer.load(folder)

    def test_files_by_version(self, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
        with raises(UnsupportedError, "fast_tokenizer_files"):
            Tokenizer.load(folder)

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    def test_links_that_leave_the_folder(
        self, name: str, llama3: Backend, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = publish(tmp_path, llama3)
        outside = tmp_path_factory.mktemp("outside") / "secret"
        outside.write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        with raises(CheckpointError, folder / name, outside):
            Tokenizer.load(folder)


class TestTemplates:
    def rendered(self, folder: Path) -> str:
        found = Tokenizer.load(folder)
        return found.decode(found.encode_chat([{"role": "user", "content": "hi"}]))

    def test_a_file_of_its_own_comes_first(self, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, chat_template="config")
        assert self.rendered(folder) == "config"
        (folder / "chat_template.jinja").write_text("{{ 'file' }}")
        assert self.rendered(folder) == "file"

    def test_of_several_the_default_one(self, llama3: Backend, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        folder = publish(tmp_path, llama3, chat_template=named)
        assert self.rendered(folder) == AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
        assert self.rendered(folder) == "plain"

    def test_several_without_a_default_are_no_chat(self, llama3: Backend, tmp_path: Path) -> None:
        folder = publish(tmp_path, llama3, chat_template=[{"name": "rag", "template": "x"}])
        assert not Tokenizer.load(folder).has_chat_template

    def test_special_tokens_by_name(self, llama3: Backend, tmp_path: Path) -> None:
        template = "{{ bos_token }}{{ turn_token }}{{ unk_token }}{{ messages[0].content }}{{ eos_token }}"
        folder = publish(tmp_path, llama3, chat_template=template, turn_token=USER)
        ids = Tokenizer.load(folder).encode_chat([{"role": "user", "content": "hi"}])
        assert ids == [0, llama3.token_to_id(USER), *llama3.encode("hi", add_special_tokens=False).ids, 1]


class TestWithoutTokenizerJson:
    def publish(self, folder: Path, backend: Backend, model_type: str, tokenizer_class: str) -> Path:
        publish(folder, backend, model_type, tokenizer_class=tokenizer_class, bos_token=None)
        model = json.loads(backend.to_str())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
        added = {str(i): t.__getstate__() for i, t in backend.get_added_tokens_decoder().items()}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
        return folder

    @pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "qwen3_moe"])
    def test_vocabulary_and_merges_of_a_class_that_is_the_definition(self, model_type: str, tmp_path: Path) -> None:
        backend = byte_level(QWEN2, normalizer=normalizers.NFC(), bos=False)
        found = Tokenizer.load(self.publish(tmp_path, backend, model_type, "Qwen2Tokenizer"))
        assert [found.encode(text) for text in PROBES] == [backend.encode(text).ids for text in PROBES]

    @pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizer"])
    @pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "olmoe"])
    def test_of_another_class_they_are_refused(self, tokenizer_class: str, model_type: str, tmp_path: Path) -> None:
        """transformers makes an empty tokenizer of some, and takes the words of another model for others."""
        folder = self.publish(tmp_path, byte_level(LLAMA3, bos=False), model_type, tokenizer_class)
        with raises((CheckpointError, UnsupportedError), folder, "tokenizer.json"):
            Tokenizer.load(folder)

    def test_mistrals_own_format_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tekken.json").write_text("{}")
        (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
        with raises(CheckpointError, tmp_path, "tokenizer.json"):
            Tokenizer.load(tmp_path)


def test_added_tokens_that_are_not_special_are_shown(llama3: Backend, tmp_path: Path) -> None:
    backend = Backend.from_str(llama3.to_str())
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    found = Tokenizer.load(publish(tmp_path, backend))
    assert found.decode(found.encode("<think>a")) == "<think>a"
