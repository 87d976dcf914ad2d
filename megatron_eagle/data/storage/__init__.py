"""Where a data set lies and what one sample looks like in its shards."""
