"""One sample: conversation, tokens, how its pictures are cut, and the pack that samples become."""
