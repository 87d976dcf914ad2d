"""Questions to a model behind an OpenAI-compatible endpoint: within limits, each asked once, every answer kept."""
