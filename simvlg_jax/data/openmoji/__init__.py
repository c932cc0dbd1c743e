"""The OpenMoji example: emoji pictures with their English names."""

VERSION = "1.0.0"
