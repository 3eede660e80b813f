"""The direct way between gateways and models' replicas: many calls over one connection, no pickle, nothing of Ray."""
