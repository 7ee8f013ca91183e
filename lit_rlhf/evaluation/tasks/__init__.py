"""Benchmarks as lm-eval task files with the paper's prompts (App. D), and their readers and metrics."""
