"""The engine over HTTP. An API is a folder; what all of them share stands beside them."""
