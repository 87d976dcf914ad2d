"""Who computes what: process groups, and packs handed round within a replica."""
