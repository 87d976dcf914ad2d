"""What people look at before they train: packs, lengths, samples as the model sees them."""
