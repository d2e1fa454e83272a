"""The definitions of the ops in plain PyTorch: any dtype, any device, no import from the rest of the package."""
