"""Stages of trials, from batches to results.json."""
