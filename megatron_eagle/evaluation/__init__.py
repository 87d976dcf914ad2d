"""Answers from a trained model, and their score."""
