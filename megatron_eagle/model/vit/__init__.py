"""What the encoders that are vision transformers have in common; each is a folder of ``encoders`` that uses this."""
