"""Probes: planted cases that a judge must rank rightly before what it scores is used."""
