"""One checkpoint that other engines open, made of a plan: `amalgam export`.

`contract.py` has the nouns, `targets/` a file for each layout that can be written, `registry.py` finds them, and
`exporting.py` is what the verb calls.
"""
