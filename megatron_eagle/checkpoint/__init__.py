"""What training writes and reads: whole or not at all, checksummed, in any layout."""
