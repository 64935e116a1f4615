"""Makes what the demo ships: tokenizer, trained encoders, and the weights from which stage 1 starts."""
