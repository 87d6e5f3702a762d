"""What operators look at: a read-only page and JSON API over everything, behind a token."""
