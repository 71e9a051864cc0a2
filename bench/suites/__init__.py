"""What is run, on a CPU, on a GPU and in miniature: one file a suite."""
