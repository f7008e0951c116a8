"""The rules for JAX's own primitives; importing this package registers them."""

from jlora.transform.rules import arithmetic, control, convolution, lookup, products, views

__all__ = ["arithmetic", "control", "convolution", "lookup", "products", "views"]
