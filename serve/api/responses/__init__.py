"""OpenAI's Responses API, as far as nothing has to be stored for it."""
