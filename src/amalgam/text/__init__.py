"""Text ↔ token ids: tokenizers as checkpoints publish them, chat templates, and the text of an answer as it comes."""
