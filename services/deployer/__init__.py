"""Verifies each new version, tries it on a share of runs, and promotes it on evidence or rolls it back."""
