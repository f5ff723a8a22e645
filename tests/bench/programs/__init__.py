"""Programs that tests run in child processes, on simulated cards; each prints JSON at its end."""
