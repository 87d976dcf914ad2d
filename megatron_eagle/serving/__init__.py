"""From an exported model to answers."""
