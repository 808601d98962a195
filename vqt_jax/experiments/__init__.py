"""Complete experiments: training, then reports."""
