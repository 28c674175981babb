"""OpenAI's interface, one file for each route, and what they share."""
