"""What a command stands on: its settings, its way to the servers, and what it prints."""
