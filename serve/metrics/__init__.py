"""What is counted of an endpoint, and how Prometheus reads it."""
