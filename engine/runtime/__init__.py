"""Who runs where, and how they are joined: channels, actors, processes, the front and the core."""
