"""Stores what the world says, and settles each closed window with it."""
