"""A small market that the demo's agents live in: eight tickers and one prediction market, all from one seed."""
