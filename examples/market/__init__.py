"""A small market that the demo's agents live in: sixteen tickers and one prediction market, all from one seed."""
