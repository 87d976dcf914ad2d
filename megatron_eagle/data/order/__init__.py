"""Which samples share a pack and which rank gets it: lengths, packing, plan."""
