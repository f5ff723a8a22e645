"""The training steps, by area; each is written as the package's documentation would write it."""
