"""Tuned models: bundles, and models that classify images with them."""
