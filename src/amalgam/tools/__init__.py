"""What the command line's verbs do: quantize, bench, analyze and the like, as functions."""
