"""Measuring quality: a traced model computed whole in torch, perplexity, and what quantization changed."""
