"""Programs on top of encoder_fast, to be run from a clone; they use its public API alone."""
