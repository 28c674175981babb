"""A candidate beside the weights in use: a share of the requests runs on it (canary), or both compute some requests and
are compared (shadow).

In: a deployment, a version that it keeps, requests as they end. Out: which weights a request runs on, a report with a
verdict, and a change of the weights where that is asked for. Must never know: HTTP. What the figures say is decided in
`planning.trials`.
"""
