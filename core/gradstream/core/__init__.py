"""What every part of gradstream shares: plans, fragments, codecs, the wire, recipes, errors."""

__version__ = "0.1.0"
