"""What a checkpoint has beside its weights goes along."""

from __future__ import annotations

from pathlib import Path

import torch

from amalgam.checkpoint.store import TensorStore
from amalgam.composition.carry import carry_files
from tests.models.tiny import write_checkpoint


def test_what_is_carried_twice_is_there_once(tmp_path: Path) -> None:
    """A run that was killed behind it does it again."""
    source, made = tmp_path / "source", tmp_path / "made"
    write_checkpoint(source, {}, {"norm.weight": torch.ones(2)})
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    made.mkdir()
    for _ in range(2):
        assert carry_files(TensorStore.open(source), made) == []
    assert (made / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
