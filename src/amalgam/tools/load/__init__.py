"""Load for a server that speaks OpenAI's interface, and what the server makes of it."""
