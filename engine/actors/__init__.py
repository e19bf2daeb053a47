"""The four actors of a request's path, one file each; their logic knows nothing of anyio."""
