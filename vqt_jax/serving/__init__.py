"""A web server for tuned models: a page, JSON, batches, limits."""
