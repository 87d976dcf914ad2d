"""The code that an exported folder carries: transformers' remote code, so without a single import of this project."""
