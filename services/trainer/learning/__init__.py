"""What the torch engine does with tokens: sequences, likelihood, losses, checkpoints."""
