"""A mixture whose experts lie on several devices: each multiplies its own, and one adds."""
