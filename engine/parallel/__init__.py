"""How one model is spread over several devices: who has which part (mesh.py, without torch), and how parts meet."""
