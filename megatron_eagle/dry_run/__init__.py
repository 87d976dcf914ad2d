"""A job walked through symbolically on one machine: exchanges, bytes, deadlocks."""
