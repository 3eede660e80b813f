"""What runs in a gateway replica: HTTP in and out. No model, no tokenizer, nothing of Ray."""
