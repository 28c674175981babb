"""What `amalgam prune` does: what goes is chosen (`choosing.py`), measured beside plans of the same bytes
(`comparing.py`, `copies.py`) and drawn (`drawing.py`); `options.py` is what can be asked, `running.py` all of it."""
