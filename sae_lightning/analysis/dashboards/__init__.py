"""Writes catalogues in other tools' formats: Neuronpedia, SAEDashboard, circuit-tracer."""
