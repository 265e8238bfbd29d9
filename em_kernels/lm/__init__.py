"""What the rooms above share about language models: heads, prompts, samples, answers."""
