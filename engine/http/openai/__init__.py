"""OpenAI's chat completions, completions, embeddings and models; what other APIs share with them."""
