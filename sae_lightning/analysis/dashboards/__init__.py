"""Writes what is known of features in the formats of dashboards: Neuronpedia and SAEDashboard."""
