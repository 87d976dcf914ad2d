"""The field's forms of a record, read into the one form that shards hold; one small file a form (``registry.py``)."""
