"""Manifests for Kubernetes and KubeRay 1.7: a small spec → objects. Pure but for what runs inside pods."""
