"""The ``ratchet`` command line and what it starts on one machine."""
