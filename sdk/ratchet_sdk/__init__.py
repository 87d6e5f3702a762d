"""Ratchet's SDK: what an agent needs to be recorded, and nothing else."""

from ratchet_sdk.recorder import Recorder, SyncRecorder
from ratchet_sdk.run import Run
from ratchet_sdk.step import RunStep

__all__ = ["Recorder", "Run", "RunStep", "SyncRecorder"]
