"""Everything that one command does: training, then its report."""
