"""Runs a study of many runs: its design, its cost, its scheduling, its statistics and its leaderboard."""
