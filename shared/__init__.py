"""What two services use: the wire between them, the bus, the database, artifacts, routing, telemetry."""
