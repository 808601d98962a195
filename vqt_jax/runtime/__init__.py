"""The computer: files, processes, devices, memory, terminal."""
