"""Recipes: YAML files that name a model, a quantization, a GPU and a workload."""
