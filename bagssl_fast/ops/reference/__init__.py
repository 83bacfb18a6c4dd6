"""The truth: every op in plain torch, written as its paper writes it, one file per op."""
