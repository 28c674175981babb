"""HTTP → engine. In: HTTP requests. Out: JSON and event streams. Must never know: tensors.

`create_app` builds the application, `run` serves it until a signal arrives. A router file holds an endpoint's handler
with its request and answer beside it; `Service` is what they share.
"""

from amalgam.server.app import create_app, run

__all__ = ["create_app", "run"]
