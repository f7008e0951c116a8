"""How the property tests draw their examples."""

from hypothesis import settings

# Every run draws new examples, as many as each test allows. A failure prints the decorator that reproduces it, and the
# example is kept in .hypothesis. `--hypothesis-profile=same` draws the same examples each time.
settings.register_profile("new", derandomize=False, deadline=None, print_blob=True)
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True, database=None)
settings.load_profile("new")
