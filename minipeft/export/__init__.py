"""Files for others: GGUF of models and adapters, and the rules by which servers take an adapter's folder."""
