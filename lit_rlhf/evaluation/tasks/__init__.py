"""Benchmarks as task files of lm-eval, with the paper's prompts (App. D), and what they need: readers and metrics."""
