"""How much stage 2 of SPHINX-V learns in the demo: three seeds, start, end and shuffled-prompt control."""
