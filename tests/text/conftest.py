import pytest

from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.text.tokenizer_files import LLAMA3, byte_level, sentence_piece


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="module", params=["prepend", "first", "never", "llama3"])
def kind(request):
    backend = byte_level(LLAMA3) if request.param == "llama3" else sentence_piece(request.param)
    return Tokenizer(TokenizerParts(backend), frozenset())
