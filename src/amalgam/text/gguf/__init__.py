"""The tokenizer inside of a GGUF file: its metadata → `TokenizerParts`, ends of an answer, pre-tokenizers by name."""
