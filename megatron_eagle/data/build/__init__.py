"""Sources as users have them -> checked Energon shards."""
