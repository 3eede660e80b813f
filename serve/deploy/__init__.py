"""What runs in the cluster to deploy an endpoint: the deploy job, and the classes that Ray Serve makes replicas of."""
