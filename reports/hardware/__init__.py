"""What a real GPU does, beside what autobatch foretells."""
