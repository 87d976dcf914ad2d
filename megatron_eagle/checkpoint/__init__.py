"""Hugging Face checkpoints in and out, tensor by tensor, without building the model, each conversion with a proof."""
