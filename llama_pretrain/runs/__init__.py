"""Run directories: what lies where in them, and what can be told from them."""
