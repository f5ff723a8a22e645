"""What pages take for known is no module of tests."""

collect_ignore_glob = ["settings/*"]
