"""How values become codes: a quantizer chooses them on the grid of any format that can be made.

In: a matrix and a `Grid`. Out: `Codes`, which the format encodes. Must never know: layouts, layers, families.
One file for each quantizer; one that needs more than the matrix, such as calibration, is a dataclass that holds it.
"""
