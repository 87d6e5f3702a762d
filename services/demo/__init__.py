"""`ratchet demo` and `ratchet simulate`: a market with agents, what the screen shows of it, the report at its end."""
