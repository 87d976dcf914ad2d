"""Asking a trained model: one answering engine behind a command, an OpenAI-compatible endpoint and a page."""
