"""The blocks that several families share: norms, attention, MLPs, mixtures of experts.

In: one block's weights. Out: instructions. Must never know: requests, files, precisions, how instructions are run.

Each block is a frozen dataclass of its sizes; `slots` says which weights it needs, `emit` what is computed with them.
"""
