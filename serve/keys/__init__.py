"""Keys: who may call the endpoint, how much, and what each has used."""
