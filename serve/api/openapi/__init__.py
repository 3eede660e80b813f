"""The description of all routes at /openapi.json, made from what the parsers read."""
