"""What is told about recorded points: leaderboard, HTML page, history, regression gate. Reads results, never models."""
