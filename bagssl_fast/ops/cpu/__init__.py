"""The fast CPU forms of the ops, one file per op; a missing file means that the reference runs."""
