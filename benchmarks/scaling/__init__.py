"""The parts of bench-scale: a cluster of real processes (`cluster`), simulated workers (`workers`), a module a case."""
