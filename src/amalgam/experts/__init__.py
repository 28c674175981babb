"""Routing → statistics: which experts the traffic uses. An observer; the models never import it."""
