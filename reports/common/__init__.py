"""What two reports or more share. Reports import this folder and autobatch, never one another."""
