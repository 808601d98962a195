"""From images to batches of stored features."""
