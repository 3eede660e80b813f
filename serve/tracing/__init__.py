"""Spans of requests, for OpenTelemetry: the gateway's, below them the replicas', below them what an engine did.

`destination` says where they go (pure), `begin` starts them in a process, `spans` is the only module that imports
OpenTelemetry. Where nobody has said where spans go, `begin` returns None, and no request costs more than that test.
"""
