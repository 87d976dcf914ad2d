"""Before a job: what it costs in memory and time, by rank and by step; after it: whether that was true."""
