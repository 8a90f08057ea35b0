"""Methods that prove what they find, for small layers."""
