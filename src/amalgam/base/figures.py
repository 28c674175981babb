"""What pages with a figure have in common.

In: a plotly figure. Out: HTML that fetches nothing from elsewhere. Must never know what it shows.
"""

from __future__ import annotations

from typing import Any

# Colours that people with any colour vision tell apart (Okabe & Ito 2008); the first is the strongest.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def page(figure: Any) -> str:
    """A page with plotly.js in it."""
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
