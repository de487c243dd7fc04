"""Console commands: list, compare, verify, leaderboard, import-deepspeed; exit codes."""
