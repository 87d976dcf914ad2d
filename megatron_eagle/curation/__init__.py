"""Sources -> kept samples, ready for ``data build``, and a ledger that has the fate of every sample."""
