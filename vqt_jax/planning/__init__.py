"""What a config costs, found by compiling its programs without running them."""
