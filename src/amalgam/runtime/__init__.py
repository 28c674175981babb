"""The composition root: settings → a running model, live changes of it, and what it says of itself.

`opening.open_deployment` makes a `Deployment`. Imports nothing here: the server names its types before torch is loaded.
"""
