"""Programs run on the bench and are not collected here: some need libraries of their own."""

collect_ignore_glob = ["programs/*.py"]
