"""A model's tokenizer: text to ids, ids to text, and long prompts in processes of their own."""
