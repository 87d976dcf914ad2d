"""One day on a GPU in one command: what was proved on CPUs is run there, measured and written down."""
