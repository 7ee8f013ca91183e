"""Prompts to experience: sampling, engines, KL control, the experience loader."""
