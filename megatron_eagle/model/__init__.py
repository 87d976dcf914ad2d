"""PackedBatch -> loss of the pack, as Megatron ModuleSpecs."""
