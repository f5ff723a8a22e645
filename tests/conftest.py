import os

from hypothesis import settings

# the same examples in every CI run: a new counterexample belongs to the change that is made with it
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
