"""Tokenizer, chat template, the stream of an answer. Must never know: tensors, requests."""
