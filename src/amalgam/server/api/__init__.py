"""Endpoints: each file is a router, with handlers, requests and answers side by side."""
