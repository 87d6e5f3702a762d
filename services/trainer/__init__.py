"""Turns scored groups into better versions: readiness, batches, GRPO or imitation, checkpoints."""
