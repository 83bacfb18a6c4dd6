"""What an encoder has learned: features of bags, kNN and linear probe, quality without labels."""
