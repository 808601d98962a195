"""Cost of a config, found by compiling its programs without running them."""
