"""What of a model can go: experts, layers, channels, single weights; chosen by what they do on texts.

In: a wide model, texts. Out: a `Cut`, the model behind it, and its checkpoint. Must never know: how the result compares
with other ways to save bytes.

`survey.py` measures while texts pass, `experts.py`, `layers.py`, `channels.py` and `sparsity.py` choose, `cut.py` says
what remains and `config.py` how a config.json says it, `writing.py` makes the folder, `trial.py` the same in memory.
"""
