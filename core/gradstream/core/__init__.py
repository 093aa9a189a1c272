"""The parts that all packages of gradstream share: plans, fragments, codecs, wire formats, recipes, errors."""

__version__ = "0.1.0"
