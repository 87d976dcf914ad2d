"""Shards -> endless packs of a rank, resumable exactly."""
