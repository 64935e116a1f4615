"""Language: decoders over transformers, packed attention, generation."""
