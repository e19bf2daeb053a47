"""How a step is launched: its inputs, recorded or captured, and the steps of the warm-up."""
