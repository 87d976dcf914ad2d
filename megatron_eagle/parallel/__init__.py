"""Who computes what: process groups, and packs distributed within a replica."""
