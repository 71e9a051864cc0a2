"""What kernels cost by their machine code: compiled for cards that are not there, and counted."""
