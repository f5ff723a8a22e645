"""Programs are run on the bench, not collected here: some need libraries that are not everywhere."""

collect_ignore_glob = ["programs/*.py"]
