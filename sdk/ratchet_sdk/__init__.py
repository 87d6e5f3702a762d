"""Ratchet's SDK: what an agent needs to be recorded, and nothing else."""

from ratchet_sdk.recorder import Recorder

__all__ = ["Recorder"]
