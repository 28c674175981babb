"""How one checkpoint becomes the same model in another precision; `composition.quantize` is the way in.

In: the weights of a layer, and what its projections read. Out: their tensors in the published layout, files that an
interrupted run goes on from, a report. Must never know: rules, other sources, requests.
"""
