"""What runs in a model's replica: the engines, and what stands between them and the gateway."""
