"""Generation for ragged prompts beside one prompt at a time and the references' batch algorithm."""
