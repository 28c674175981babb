"""A model as llama.cpp reads it: one GGUF file.

`architectures.py` says which models llama.cpp has and what it wants to be told of each, `metadata.py` what it wants of
all, `limits.py` what it does not compute; `tensors.py` has the weights, `checking.py` reads what a file will say before
it is written, `templates.py` has chat templates in Go.
"""
