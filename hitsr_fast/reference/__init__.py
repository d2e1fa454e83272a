"""The definitions of the ops: plain PyTorch, any dtype, any device, no import from the other packages."""
