"""The embedded run: its data set, its steps, its report."""
