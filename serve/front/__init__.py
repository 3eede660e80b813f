"""The gateway's HTTP server: its socket, limits for slow clients, TLS, request ids, deadlines and the access log."""
