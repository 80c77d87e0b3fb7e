"""What a process has that executes runs: connections, slots, signals, external steps."""
