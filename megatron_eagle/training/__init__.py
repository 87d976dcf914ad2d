"""The loop: step, loss, stage freezing, optimizer, checkpoint, log."""
