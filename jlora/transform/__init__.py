"""The function transform. Its README.md says how it works and how to add a rule."""

# Importing any part of the transform registers the rules for JAX's own primitives first, so that a user's rule for one
# of them is the last one registered, and wins.
from jlora.transform import rules

__all__ = ["rules"]
