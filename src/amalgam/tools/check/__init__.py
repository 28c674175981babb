"""Whether a server is ready for production: checks that ask it, measure it, and look at what is around it.

`contract.py` says what a check is; `checks/` has a file for each category of them, and whatever lies there is found.
"""
