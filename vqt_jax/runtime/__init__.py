"""What a run finds: files, processes, devices, memory, terminal."""
