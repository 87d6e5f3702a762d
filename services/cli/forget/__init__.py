"""`ratchet forget`: what runs said is erased wherever it lies; the rules, the streams, the exported files."""
