"""Files on disk -> PackedBatch."""
