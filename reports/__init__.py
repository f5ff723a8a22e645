"""Scripts that show what autobatch claims: each prints its figures and can be run again."""
