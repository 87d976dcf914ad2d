"""Hugging Face <-> Megatron, assembling, export, and the proof of each."""
