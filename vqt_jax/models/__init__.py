"""ViTs, readers, editors and heads: pure functions of arrays."""
