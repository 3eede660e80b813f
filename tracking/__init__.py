"""What happened: runs, metrics and model versions, kept in MLflow. Imports no other folder of Tandem."""
