"""Many runs of one command: planned together, run one by one or beside each other, compared."""
