"""A real federation: both its ends, a device's process, and the certificates."""
