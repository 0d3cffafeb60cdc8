"""What must be identical for two numbers to be comparable: flags, data, model, training, decoding, metrics,
records."""
