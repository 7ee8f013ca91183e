"""Where a model, an evaluation or a sampled file comes from: `lineage.json`, its tree, model cards, the hub, W&B."""
