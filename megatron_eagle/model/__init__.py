"""PackedBatch -> loss per token, as Megatron ModuleSpecs."""
