"""GGUF: its types of blocks are formats, its metadata are the config, its tensors have names of their own."""

from amalgam.formats.gguf import blocks, k_quants, latent

FORMATS = (*blocks.FORMATS, *k_quants.FORMATS, latent.FORMAT)
