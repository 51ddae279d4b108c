"""`stochca sweep`: the same fine-tuning in several settings, each over several seeds."""
