"""One file an operator; its name is the file's. ``curation/operator.py`` has the interface."""
