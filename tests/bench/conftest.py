"""Programs run on the bench and are not collected: some need libraries that may be missing."""

collect_ignore_glob = ["programs/*.py"]
