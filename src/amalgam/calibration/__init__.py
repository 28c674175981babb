"""What a model's projections are given when it reads texts, layer by layer.

In: a model's weights, texts. Out: the inputs of each projection, the tokens of each expert. Must never know: what is
made of them (codes and scales, sensitivities, plans), requests.

`texts.py` makes token ids of texts, `stream.py` sends them through one layer after the other and shows what every
projection reads, `inputs.py` says what can be asked of that.
"""
