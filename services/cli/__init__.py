"""The `ratchet` command line: one file a family of commands; a service is imported only when it is run."""
