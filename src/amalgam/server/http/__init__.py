"""What all endpoints share of HTTP: bodies, errors, origins, the access log, the lifecycle.

Must never know: what an endpoint does.
"""
