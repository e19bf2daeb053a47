"""Routes in the shape of SGLang's and vLLM's own: /generate, /tokenize."""
