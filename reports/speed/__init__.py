"""How long an answer takes, and how much memory."""
