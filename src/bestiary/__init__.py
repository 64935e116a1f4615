"""bestiary: an experiment platform for multimodal LLMs."""
