"""A cluster on Ray Serve. The only room that knows Ray; `amalgam deploy ray` imports it."""
