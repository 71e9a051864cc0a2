"""``python -m encoder_fast.cli``, for where the script ``encoder-fast`` is not on the path."""

from encoder_fast.cli import main

main()
